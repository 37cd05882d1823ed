"""What a run hands on of its configuration: settings that differ from their defaults, all at once, arrive as they are.

Nothing is trained here: policy and engine are replaced by what records their arguments.
"""

import json
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data.byte_model import byte_tokenizer, make_byte_model
from real_megatron.errors import ConfigError, DataError, PromptRefused
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.scores import ScoreScale
from real_megatron.training import preparation, rl, session, sft
from real_megatron.training.batch_order import BatchOrder, rollout_seed
from real_megatron.training.examples import prompt_groups, target_groups
from real_megatron.training.rl import generate, reinforcement_objective
from real_megatron.training.session import Session
from tests.support.rollout_fakes import ScriptedEngine

SETTINGS = [
    "seed=5",
    "epochs=2",
    "batch.prompts=3",
    "batch.mini_batches=2",
    "objective.ratio=ppo",
    "scale.scores=[A, B]",
    "scale.values=[0, 10]",
    "scale.anchor='Score: '",
    "checkpoint.keep=7",
    "parallel.timeout_minutes=9",
    "model.dtype=bfloat16",
    "data.max_prompt_tokens=50",
    "data.max_response_tokens=11",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def config_of(tmp_path: Path, model: Path, *overrides: str) -> RunConfig:
    """Ten rows with a column that the template reads, and one that stays with them."""
    rows = [{"id": f"row {i}", "question": f"is it {i}?", "label": 10 * (i % 2), "group": f"g{i}"} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "template.txt").write_text("Q: {question}")
    places = [f"model.path={model}", f"output={tmp_path}/run", f"data.template={tmp_path}/template.txt"]
    return RunConfig.from_yaml(None, [*places, f"data.train.0.path={tmp_path}/train.jsonl", *SETTINGS, *overrides])


class Recorded:
    """Stands for `Policy`: keeps what it was built with."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.runtime = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def open_session(monkeypatch: pytest.MonkeyPatch):
    """open_session(config, load): a session whose policy is only recorded."""
    monkeypatch.setattr(session, "Policy", Recorded)
    return Session


def test_a_session_is_what_its_configuration_says(open_session, model: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, model)
    run = open_session(config, prompt_groups)
    assert (run.scale.texts, run.scale.values, run.scale.anchor_text) == (["A", "B"], [0.0, 10.0], "Score: ")
    assert (run.order.num_examples, run.order.batch_size, run.order.seed) == (10, 3, 5)
    assert run.steps == 7  # two passes over ten examples, three at a time
    assert run.policy.arguments == (config, run.scale.tree, run.scale.values, 7 * 2, model, ())
    assert (run.store.directory, run.store.keep) == (tmp_path / "run/checkpoints", 7)
    run.close()
    assert open_session(config.with_overrides(["epochs=null", "steps=4"]), prompt_groups).steps == 4
    # The template's text, the label, the id, and the columns that a reward may read.
    assert bytes(run.groups[3].prompt_ids) == b"Q: is it 3?"
    assert (run.groups[3].label, run.groups[3].example_id) == (10.0, "row 3")
    assert run.groups[3].meta["group"] == "g3"


def test_the_model_is_asked_for_at_its_revision(
    open_session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(preparation, "checkpoint_directory", lambda *of: asked.append(of) or model)
    open_session(config_of(tmp_path, model, "model.revision=v2"), prompt_groups)
    assert asked == [(str(model), "v2", True)]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("model.path=", ConfigError, "model.path is not set"),
        ("metrics.wandb_project=x", ConfigError, "wandb is not installed"),
        ("rollout.python=/no/such/python", ConfigError, "rollout.python: /no/such/python is not there"),
        ("data.max_response_tokens=100000", ConfigError, r"data\.train: example row .* has a prompt of"),
        ("scale.anchor=' '", ConfigError, "scale.anchor: the anchor ' ' has no visible character"),
        ("scale.values=[1, 10]", DataError, "label 0 is outside of the score scale"),
        ("data.eval.dev.path=absent.jsonl", DataError, "absent.jsonl"),
        ("data.max_prompt_tokens=3", ConfigError, "no training example is left"),
    ],
)
def test_what_cannot_be_trained_is_found_before_the_model_is_loaded(
    override: str, error: type[Exception], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(session, "Policy", load)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    engine = "rollout.engine=sglang" if override.startswith("rollout") else "rollout.engine=transformers"
    with pytest.raises(error, match=message):
        Session(config_of(tmp_path, model, engine, override), prompt_groups)


def test_the_engine_is_built_from_the_runs_settings(
    open_session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, timeouts = [], []
    monkeypatch.setattr(session, "build_engine", lambda *of: built.append(of))
    monkeypatch.setattr(session, "host_group", lambda minutes: timeouts.append(minutes) or "the group")
    run = open_session(config_of(tmp_path, model, "rollout.batch_size=3"), prompt_groups)
    run.start_engine()
    ((spec, group),) = built
    assert (spec.config, spec.config.batch_size, group, timeouts) == (run.config.rollout, 3, "the group", [9])
    assert (spec.model_dir, spec.tokenizer, spec.work_dir) == (model, run.tokenizer, tmp_path / "run/rollout")
    assert (spec.max_prompt_tokens, spec.max_response_tokens) == (50, 11)
    assert (spec.dtype, spec.device, spec.serve_loaded) == (torch.bfloat16, torch.device("cpu"), False)


class Waking(ScriptedEngine):
    """Remembers the versions of the weights that it is given, too."""

    def update_weights(self, tensors: Any, version: int) -> None:
        self.asked.append(version)


def test_weights_are_published_once_and_colocated_servers_sleep_between(
    open_session, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation publishes the weights that the next batch is sampled from."""
    monkeypatch.setattr(Recorded, "export", lambda *_: iter(()), raising=False)
    monkeypatch.setattr(Recorded, "allocate_optimizer_state", lambda self: self.log.append("moments"), raising=False)
    for colocate, expected in ((False, [0, 1]), (True, ["moments", "free", "free", 0, "wake", "free", "wake"])):
        run = open_session(config_of(tmp_path, model, f"rollout.colocate={colocate}"), prompt_groups)
        engine = Waking()
        run.policy.log = engine.asked
        monkeypatch.setattr(session, "build_engine", lambda *_, engine=engine: engine)
        monkeypatch.setattr(run, "_free_cached_memory", lambda engine=engine: engine.asked.append("free"))
        run.start_engine()
        for step in (0, 0, 1) if not colocate else (0, 0):
            run.publish(step)
        assert engine.asked == expected
        run._lock.close()


@pytest.mark.parametrize(("engine", "everywhere"), [("transformers", True), ("sglang", False), ("vllm", False)])
def test_weights_come_to_every_rank_where_each_has_an_engine(engine: str, everywhere: bool) -> None:
    config = RunConfig.from_tree({"model": {"path": "m"}, "rollout": {"engine": engine}})
    asked: list[bool] = []
    policy = SimpleNamespace(export=lambda where: asked.append(where) or iter(()))
    run = SimpleNamespace(config=config, policy=policy, engine=Waking(), _published=None)
    Session.publish(run, 3)
    assert asked == [everywhere] and run.engine.asked == [run._published] == [3]


def test_an_export_is_that_of_the_runs_last_step(model: Path, tmp_path: Path) -> None:
    """Given more steps, or more passes over the data, the run has another last step."""
    (tmp_path / "hf").mkdir()
    for saved, now, same in (
        ("steps=3", "steps=3", True),
        ("steps=3", "steps=4", False),
        ("epochs=1", "epochs=1", True),
        ("epochs=1", "epochs=1.5", False),
    ):
        config = config_of(tmp_path, model, saved)
        (tmp_path / "hf/real_megatron.yaml").write_text(config.to_yaml())
        run = SimpleNamespace(config=config.with_overrides([now]), _hf=tmp_path / "hf")
        assert Session._exported(run) == same, (saved, now)
    assert not Session._exported(SimpleNamespace(_hf=tmp_path / "absent"))


# --- a batch of rollouts ----------------------------------------------------------------------------------------------

TOKENIZER = byte_tokenizer()
SCALE = ScoreScale.resolve(TOKENIZER, ["A", "B"], [0, 10], "Score: ")


def batch(
    *overrides: str, texts: tuple[str, ...] = ("good Score: ",) * 4, rank: int = 0
) -> tuple[Any, Any, dict[str, float]]:
    """`generate` for the second step of three prompts, two responses each: the engine, the groups, the metrics."""
    settings = ["seed=5", "rollout.n=2", "rollout.temperature=0.7", "data.max_response_tokens=33", *overrides]
    config = RunConfig.from_yaml(None, settings)
    responses = [Response(list(text.encode()), [-1.0] * len(text), "stop", 0) for text in texts]
    engine = ScriptedEngine([responses[:2], responses[2:]])
    run = SimpleNamespace(
        config=config,
        groups=[Group([i], [], 1.0, f"row {i}") for i in range(6)],
        order=BatchOrder(6, 2, seed=5),
        engine=engine,
        engine_in_use=Lock(),
        tokenizer=TOKENIZER,
        scale=SCALE,
        policy=SimpleNamespace(runtime=SimpleNamespace(rank=rank)),
    )
    groups, metrics = generate(run, reinforcement_objective(config), 1)
    return engine, groups, metrics


def test_responses_are_sampled_as_configured() -> None:
    """Also the nucleus, though `train` takes the whole of it only."""
    engine, groups, metrics = batch()
    ((prompts, params, seeds),) = engine.asked
    chosen = BatchOrder(6, 2, seed=5).batch(1)
    assert prompts == [[i] for i in chosen] and [group.prompt_ids for group in groups] == prompts
    assert params == SamplingParams(n=2, temperature=0.7, top_p=1.0, max_new_tokens=33, stop=("Score: ",))
    assert seeds == [rollout_seed(5, 1, 0), rollout_seed(5, 1, 1)]
    assert metrics["rollout/no_anchor"] == metrics["rollout/small_groups"] == 0
    assert metrics["rollout/response_tokens"] == 12 and metrics["cot/copies"] == 0.5
    assert all(t.text is None for group in groups for t in group.trajectories)
    # Rank 0 alone has looked at the texts; of all else every rank has the same.
    assert batch(rank=1)[2] == {name: x for name, x in metrics.items() if not name.startswith("cot/")} != metrics


def test_the_nucleus_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reinforcement_objective` refuses one that is not whole: should it ever take it, engines must get it."""
    objective = reinforcement_objective(RunConfig())
    monkeypatch.setitem(globals(), "reinforcement_objective", lambda config: objective)
    engine, _, _ = batch("rollout.top_p=0.5")
    assert engine.asked[0][1].top_p == 0.5


def test_responses_without_an_anchor_become_what_the_objective_says() -> None:
    texts = ("good Score: ", "silent", "silent", "silent")
    for rule, anchors in (("penalize", [[True, False], [False, False]]), ("force", [[True, True], [True, True]])):
        _, groups, _ = batch(f"objective.no_anchor={rule}", texts=texts)
        assert [[t.answer_index is not None for t in group.trajectories] for group in groups] == anchors


def test_groups_that_are_too_small_to_compare_are_left_out_and_counted() -> None:
    """Where nothing is compared, one response is enough."""
    texts = ("good Score: ", "silent", "so Score: ", "so Score: ")
    drop = "objective.no_anchor=drop"
    for override, small in (("seed=5", 1), ("objective.baseline=none", 0), ("objective.term1=false", 0)):
        _, groups, metrics = batch(drop, override, texts=texts)
        assert len(groups) == 2 - small and metrics["rollout/small_groups"] == small


def test_a_reward_of_texts_gets_them_and_a_colocated_engine_sleeps() -> None:
    reward = "objective.reward=tests.support.extension_reward:brief_and_weighted"
    engine, groups, _ = batch(reward, "rollout.colocate=true")
    assert [t.text for group in groups for t in group.trajectories] == ["good Score: "] * 4
    assert engine.asked[-1] == "sleep" and "sleep" not in batch()[0].asked


def test_a_prompt_that_the_engine_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PromptRefused(1, "too long")

    monkeypatch.setattr(ScriptedEngine, "generate", refuse)
    with pytest.raises(DataError, match=rf"^data\.train: row {BatchOrder(6, 2, seed=5).batch(1)[1]}: too long"):
        batch()


# --- objectives and examples ------------------------------------------------------------------------------------------


def test_objectives_read_the_scale_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    renormalized = "scale.probabilities=renormalized"
    config = RunConfig.from_yaml(None, [renormalized, "objective.lam=0.5"])
    objective = reinforcement_objective(config)
    assert (objective.options.probabilities, objective.options.lam) == ("renormalized", 0.5)
    built = []
    real_build = sft.build_objective
    monkeypatch.setattr(sft, "build_objective", lambda *of: built.append(real_build(*of)))
    with pytest.raises(ConfigError, match="model.path is not set"):
        sft.train(config.with_overrides(["objective.name=raft"]))
    assert [(o.probabilities, o.lam, o.squared) for o in built] == [("renormalized", 0.5, 1.0)]


def test_an_objective_is_checked_against_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for override, message in (("batch.mini_batches=3", "batch.mini_batches is 3"), ("rollout.n=1", "rollout.n is 1")):
        with pytest.raises(ConfigError, match=message):
            rl.reinforcement_objective(RunConfig.from_yaml(None, [override]))


def test_supervised_targets_end_as_the_checkpoint_does_and_fit(model: Path, tmp_path: Path) -> None:
    """The scale of the labels, the template, and the longest response."""
    config = config_of(tmp_path, model, "objective.name=raft", "objective.ratio=none", "batch.mini_batches=1")
    rows = [json.loads(line) | {"cot": "so" * n} for n, line in enumerate(Path(config.data.train[0].path).open())]
    Path(config.data.train[0].path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = TOKENIZER.eos_token
    # Anchor, score and end have nine tokens, each critique two more, and one for its line break.
    for longest, expected in ((11, ["Score: A"]), (12, ["Score: A", "so\nScore: B"])):
        fitting = config.with_overrides([f"data.max_response_tokens={longest}"])
        groups = target_groups(fitting, model, TOKENIZER, SCALE).groups
        assert [TOKENIZER.decode(g.trajectories[0].response_ids) for g in groups] == [text + end for text in expected]
    assert bytes(groups[1].prompt_ids) == b"Q: is it 1?"


def test_supervised_targets_end_where_the_checkpoint_stops_to_generate(model: Path, tmp_path: Path) -> None:
    """What the chat template writes behind a turn, where generation_config.json lists it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "is it?", "label": 0, "cot": "so"}) + "\n")
    config = config_of(tmp_path, model, f"data.train=[{{path: {rows}}}]", "data.template=plain", "sft.cots=none")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}~{% endfor %}"
    for listed, end in (([ord("~")], "~"), ([ord("^")], tokenizer.eos_token)):
        directory = tmp_path / str(listed[0])
        make_byte_model(directory, num_hidden_layers=1)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        (group,) = target_groups(config, directory, tokenizer, SCALE).groups
        assert tokenizer.decode(group.trajectories[0].response_ids) == f"Score: A{end}"

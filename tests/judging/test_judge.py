"""A judge as a library: loaded from a directory or by name, asked with texts, messages and records."""

import asyncio
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import real_megatron
from real_megatron import Judge, RunConfig
from real_megatron.data import load_template
from real_megatron.data.byte_model import byte_tokenizer, make_byte_model
from real_megatron.errors import CheckpointError, ConfigError, DataError, EngineError, PromptRefused
from real_megatron.judging import judge as judge_module
from real_megatron.judging.judge import Score
from real_megatron.judging.reading import _answer, read_response
from real_megatron.judging.settings import judge_config
from real_megatron.rollout.scoring import ScoredResponse
from real_megatron.scores import Branch
from real_megatron.sections import known_keys
from real_megatron.training.session import Session
from tests.support.policy_ranks import make_config

PROMPTS = ["Is it good?", "Is it bad?", "Is it?"]
SHORT = ["data.max_response_tokens=16", "data.max_prompt_tokens=40"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.fixture(scope="module")
def judge(model: Path):
    with Judge.from_pretrained(model, overrides=SHORT) as judge:
        yield judge


def test_each_prompt_gets_a_score_a_distribution_and_a_critique(judge: Judge) -> None:
    scores = judge.score(PROMPTS)
    assert len(scores) == 3
    for score in scores:
        assert isinstance(score, Score) and list(score.distribution) == list("12345") and score.samples == []
        expected = sum(int(text) * p for text, p in score.distribution.items())
        assert score.score == pytest.approx(expected) and score.sampled_score in (1, 2, 3, 4, 5)
        assert isinstance(score.critique, str)


def test_a_prompt_is_judged_alike_wherever_it_stands(judge: Judge) -> None:
    assert judge.score(PROMPTS[::-1])[::-1] == judge.score(PROMPTS)


def test_texts_messages_and_records_are_prompts(judge: Judge) -> None:
    as_text, as_messages, as_record = judge.score(
        ["Is it good?", [{"role": "user", "content": "Is it good?"}], {"prompt": "Is it good?", "more": 1}]
    )
    assert as_text == as_messages == as_record


def test_several_critiques_are_listed_and_averaged(judge: Judge) -> None:
    (score,) = judge.score(PROMPTS[:1], critiques=3)
    assert len(score.samples) == 3 and score.critique == score.samples[0].critique
    assert len({sample.critique for sample in score.samples}) > 1
    assert score.score == pytest.approx(sum(sample.score for sample in score.samples) / 3)


@pytest.mark.parametrize("fp32_logits", [True, False])
def test_a_bfloat16_judge_reads_its_scores_in_float32(model: Path, fp32_logits: bool) -> None:
    """Against float64 of the weights and of the last hidden state, which is that of the (forced) anchor."""
    dtype = ["model.dtype=bfloat16"] if fp32_logits else ["model.dtype=bfloat16", "model.fp32_logits=false"]
    hidden = []
    with Judge.from_pretrained(model, overrides=[*SHORT, *dtype]) as judge:
        layer = judge.engine.model.get_output_embeddings()
        layer.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0, -1].double()))
        (score,) = judge.score(PROMPTS[:1])
        exact = (layer.weight.double() @ hidden[-1]).softmax(-1)[judge.scale.score_ids]
        expected = float(exact @ torch.tensor(judge.scale.values, dtype=torch.float64))
    error = abs(score.score / expected - 1)
    # Five probabilities, of logits below 5 that are float32 sums of 32 products; rounded, a logit is off by up to 2⁻⁸.
    assert error < 2e-6 if fp32_logits else error > 2e-4, error


def test_a_long_prompt_is_judged_by_its_end(judge: Judge, caplog: pytest.LogCaptureFixture) -> None:
    config = judge.config.with_overrides(["data.long_prompts=cut_left"])
    cutting = Judge(judge.engine, judge.tokenizer, judge.scale, config)
    assert cutting.score(["x" * 70 + "y" * 40])[0] == judge.score(["y" * 40])[0]
    assert cutting.prompts_cut == 1 and "cut the beginning of 1 of 1 prompts" in caplog.text


def test_what_cannot_be_judged_is_named(judge: Judge) -> None:
    with pytest.raises(DataError, match=r"prompt 1: the prompt has 100 tokens, more than data\.max_prompt_tokens = 40"):
        judge.score(["a", "b" * 100])
    with pytest.raises(DataError, match="prompt 0: the prompt is empty"):
        judge.score([" "])
    with pytest.raises(DataError, match="prompt 0: template 'plain' needs 'prompt'"):
        judge.score([{"question": "a"}])
    with pytest.raises(TypeError, match="takes a list of prompts"):
        judge.score("one text")


def test_a_token_that_the_model_lacks_matters_where_a_prompt_has_it(tmp_path: Path) -> None:
    """As Gemma 3's text models, whose tokenizer has a token for images."""
    model = make_byte_model(tmp_path / "model", initializer_range=0.2)
    with Judge.from_pretrained(model, overrides=SHORT) as judge:
        expected = judge.score(PROMPTS)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    with Judge.from_pretrained(model, overrides=SHORT) as judge:
        assert judge.score(PROMPTS) == expected
        assert judge.score(["<image>"])[0].score is not None  # ordinary text, as all control tokens of the data
        judge.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<image>{% endfor %}"
        with pytest.raises(DataError, match=r"^prompt 0: .*'<image>', id 258, outside the vocabulary of 258 "):
            judge.score(PROMPTS)
        with pytest.raises(PromptRefused, match="'<image>'"):
            judge.engine.branch_logprobs([[1], [258]], [Branch((), (1,))])
    with pytest.raises(CheckpointError, match="token '<image>' has the id 258, .* vocab_size in config.json is 258"):
        Judge.from_pretrained(model, overrides=["scale.scores=[<image>, B]"])
    with pytest.raises(CheckpointError, match="token '<image>' has the id 258"):  # training may meet any token
        Session(make_config(model), lambda *_: [])


def test_it_works_inside_a_running_event_loop(model: Path) -> None:
    """As in a notebook."""

    async def cell() -> list[Score]:
        with Judge.from_pretrained(model, overrides=SHORT) as judge:
            return judge.score(PROMPTS)

    assert len(asyncio.run(cell())) == 3


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Judge.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json there"):
        Judge.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="unknown engine 'best'; known: .*sglang, transformers, vllm"):
        Judge.from_pretrained(make_byte_model(tmp_path / "model"), engine="best")


def test_a_checkpoint_says_how_it_is_asked_and_nothing_else(tmp_path: Path) -> None:
    """A downloaded one must not choose the programs that run here."""
    saved = RunConfig.from_yaml(
        None,
        [
            "scale.scores=[A, B]",
            "scale.probabilities=renormalized",
            "data.template=prometheus",
            "data.max_prompt_tokens=77",
            "data.chat_template=false",
            "data.max_response_tokens=88",
            "evaluation.samples=3",
            "evaluation.temperature=0.5",
            "evaluation.top_p=0.9",
            "evaluation.no_anchor=drop",
            "data.chat_template_args.enable_thinking=false",
            "data.long_prompts=cut_left",
            "evaluation.batch_size=5",
            "rollout.python=/tmp/evil",
            "rollout.server_args=[--trust-remote-code]",
            "rollout.servers=[http://elsewhere]",
            "data.train.0.path=secret.jsonl",
            "seed=9",
        ],
    )
    (tmp_path / "real_megatron.yaml").write_text(saved.to_yaml())
    config = judge_config(tmp_path, ["rollout.engine=sglang"])
    assert config.scale == saved.scale and config.data.template == "prometheus"
    assert (config.data.max_prompt_tokens, config.evaluation.samples, config.evaluation.top_p) == (77, 3, 0.9)
    assert (config.data.chat_template_args, config.data.long_prompts) == ({"enable_thinking": False}, "cut_left")
    assert (config.data.chat_template, config.data.max_response_tokens) == (False, 88)
    assert (config.evaluation.temperature, config.evaluation.no_anchor) == (0.5, "drop")
    rest = config.model_copy(update={"scale": RunConfig().scale, "data": RunConfig().data})
    rest.evaluation.top_p = rest.evaluation.temperature = 1.0
    rest.evaluation.samples, rest.evaluation.no_anchor, rest.rollout.engine = 1, "force", "transformers"
    assert rest == RunConfig()


def test_exactly_these_keys_of_a_checkpoint_are_followed(tmp_path: Path) -> None:
    """Each key of the configuration in turn, with a value that fits a mapping alone: followed, it is refused, or kept.

    None names a program, an argument of one, a server, a module (rollout.engine, objective.reward, data.*.format,
    model.family), a data set or a directory. A new key must be put on one side or the other.
    """
    followed = set()
    sections = {key.partition(".")[0] for key in known_keys(RunConfig) if "." in key}
    for key in [key for key in known_keys(RunConfig) if key not in sections]:
        section, _, name = key.rpartition(".")
        value = {"evil": "module:name"}
        (tmp_path / "real_megatron.yaml").write_text(
            yaml.safe_dump({section: {name: value}} if section else {name: value})
        )
        try:
            if judge_config(tmp_path) != RunConfig():
                followed.add(key)
        except ConfigError:
            followed.add(key)
    assert followed == {
        *("scale.scores", "scale.values", "scale.anchor", "scale.probabilities"),
        *("scale.spellings", "scale.ends", "scale.aspects"),
        *("data.template", "data.chat_template", "data.chat_template_args"),
        *("data.max_prompt_tokens", "data.long_prompts", "data.max_response_tokens"),
        *("evaluation.samples", "evaluation.temperature", "evaluation.top_p", "evaluation.no_anchor"),
    }
    for tree in ({"rollout": "evil"}, {"data": ["evil"], "scale": None}, {"extends": "evil:config"}):
        (tmp_path / "real_megatron.yaml").write_text(yaml.safe_dump(tree))
        assert judge_config(tmp_path) == RunConfig()


def test_a_checkpoint_names_no_file_of_this_machine(tmp_path: Path) -> None:
    """A template of its own comes with it; the path that training knew may be another file here."""
    (tmp_path / "private.txt").write_text("{prompt} secret")
    model = tmp_path / "model"
    model.mkdir()
    for named in (str(tmp_path / "private.txt"), "../private.txt", "prompt_template.txt"):
        (model / "real_megatron.yaml").write_text(yaml.safe_dump({"data": {"template": named}}))
        with pytest.raises(
            ConfigError, match=r"real_megatron\.yaml: data\.template: .* name your copy with data.template="
        ):
            judge_config(model)
        assert judge_config(model, ["data.template=mine.txt"]).data.template == "mine.txt"
        (model / "prompt_template.txt").write_text("{prompt} own")
        assert load_template(judge_config(model).data.template).text == "{prompt} own"
        (model / "prompt_template.txt").unlink()


def test_a_configuration_that_is_given_is_the_only_one(tmp_path: Path) -> None:
    """As by `evaluate`: what lies beside the weights is not even read."""
    model = make_byte_model(tmp_path / "model", initializer_range=0.2)
    (model / "real_megatron.yaml").write_text("scale: {scores: [A, B]}\nrollout: {python: /tmp/evil}\n: [")
    config = RunConfig.from_yaml(None, SHORT)
    with Judge.from_pretrained(model, config=config) as judge:
        assert judge.config == config


def test_an_engine_is_built_as_the_configuration_says(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, timeouts = [], []
    monkeypatch.setattr(judge_module, "build_engine", lambda *of: built.append(of))
    monkeypatch.setattr(judge_module, "host_group", lambda minutes: timeouts.append(minutes) or "the group")
    settings = ["model.dtype=bfloat16", "parallel.timeout_minutes=9", "rollout.batch_size=3", "scale.anchor='S: '"]
    settings += ["scale.scores=[A, B]", "scale.values=[0, 10]", *SHORT]
    judge = Judge.from_pretrained(model, overrides=settings, work_dir=tmp_path)
    ((spec, group),) = built
    assert (spec.config.batch_size, spec.model_dir, spec.work_dir, spec.tokenizer) == (
        3,
        model,
        tmp_path,
        judge.tokenizer,
    )
    assert (spec.max_prompt_tokens, spec.max_response_tokens) == (40, 16)
    assert (spec.dtype, spec.serve_loaded) == (torch.bfloat16, True)
    assert (group, timeouts) == ("the group", [9])
    assert (judge.scale.texts, judge.scale.values, judge.scale.anchor_text) == (["A", "B"], [0.0, 10.0], "S: ")


def test_critiques_and_drawn_scores_have_seeds_of_their_own(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score drawn with the critique's random numbers would depend on what the critique says."""
    sampled, drawn = [], []
    real_sample, real_uniforms = judge_module.sample_scored, judge_module.uniforms
    monkeypatch.setattr(judge_module, "sample_scored", lambda *of: sampled.append(of[-1]) or real_sample(*of))
    monkeypatch.setattr(judge_module, "uniforms", lambda *of: drawn.append(of) or real_uniforms(*of))
    judge.read([[1, 2], [3]], ["a", "b"], critiques=2)
    ((first, second),) = sampled
    assert [(k, count) for _, k, count in drawn] == [(0, 1), (1, 1)] * 2
    assert len({first, second} | {seed for seed, _, _ in drawn}) == 4


def test_judging_needs_no_megatron(model: Path, tmp_path: Path) -> None:
    """The package scores, evaluates and judges a file where Megatron-Core is not installed."""
    rows = [{"id": str(i), "prompt": text, "label": 1 + i} for i, text in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = f"""
import sys
sys.modules["megatron"] = None
from pathlib import Path
from real_megatron import Judge, RunConfig, evaluate, judge_file, write_critiques
directory = Path({str(tmp_path)!r})
with Judge.from_pretrained({str(model)!r}, overrides={SHORT!r}) as judge:
    assert len(judge.score(["a", "b"])) == 2
    assert judge_file(judge, directory / "in.jsonl", directory / "out.jsonl").judged == 3
config = RunConfig.from_yaml(None, [*{SHORT!r}, f"data.eval.dev.path={{directory}}/in.jsonl",
    f"output={{directory}}/run", "evaluation.bootstrap=5"])
assert evaluate(config, {str(model)!r})["dev"].counts["examples"] == 3
import real_megatron.cli
assert "megatron.core" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_library_is_loaded_lazily() -> None:
    code = "import sys, real_megatron; real_megatron.UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    for name in real_megatron.__all__:
        assert getattr(real_megatron, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'jugde'"):
        real_megatron.jugde  # noqa: B018


def test_a_saved_configuration_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "real_megatron.yaml").write_text(yaml.safe_dump({"scale": {"scores": "no list"}}))
    with pytest.raises(ConfigError, match=r"real_megatron\.yaml: scale\.scores: 'no list' is no list"):
        judge_config(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"tensor 'model.layers.0.mlp.down_proj.weight' is missing \(and 1 others\)"),
        ("shape", r"tensor 'model.layers.0.mlp.down_proj.weight' has another shape than config.json says"),
        ("cut", "model.safetensors is damaged or not a safetensors file"),
        ("type", "config.json: model_type 'weird' is unknown to transformers"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(damage: str, message: str, model: Path, tmp_path: Path) -> None:
    """transformers alone fills what is missing with random numbers."""
    shutil.copytree(model, tmp_path / "model")
    weights, config = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
    tensors = load_file(weights)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    if damage == "missing":
        save_file({name: tensor for name, tensor in tensors.items() if name not in names}, weights, {"format": "pt"})
    elif damage == "shape":
        save_file({**tensors, names[0]: tensors[names[0]][:-1].clone()}, weights, {"format": "pt"})
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        config.write_text(config.read_text().replace('"qwen3"', '"weird"'))
    with pytest.raises(CheckpointError, match=message):
        Judge.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scores_that_are_no_numbers_end_the_job(value: float, judge: Judge) -> None:
    with pytest.raises(EngineError, match="score log-probs are (NaN|infinite): its weights are damaged"):
        _answer(judge.scale, [value] * 5, [0.5], renormalized=True)


def test_a_prompt_that_the_engine_refuses_is_named(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: object) -> None:
        raise PromptRefused(1, "the sequence is too long")

    monkeypatch.setattr(judge.engine, "generate", generate)
    with pytest.raises(DataError, match="^prompt 1: the sequence is too long"):
        judge.score(PROMPTS)


def test_a_distribution_whose_mass_underflows_is_still_drawn_from(judge: Judge) -> None:
    """Log-probs near −800 are 0 in float64: their ratios, 1 to 3 here, are not."""
    logprobs = [-800.0, -800.0 + math.log(3.0), -math.inf, -math.inf, -math.inf]
    found = [_answer(judge.scale, logprobs, [uniform], renormalized=True) for uniform in (0.2, 0.3)]
    assert [answer.sampled for answer in found] == [1.0, 2.0]
    assert found[0].expected == pytest.approx(0.25 * 1 + 0.75 * 2) and found[0].probabilities == [0.0] * 5


@pytest.mark.parametrize(
    ("response", "no_anchor", "truncated"),
    [
        (ScoredResponse([97], [-1.0] * 5, False, "stop"), False, False),
        (ScoredResponse([97], [-1.0] * 5, True, "length"), True, True),
        (ScoredResponse([97], [-1.0] * 5, True, "eos"), True, False),
        (ScoredResponse([97], None, False, "length"), True, True),
        (ScoredResponse([97], None, False, "eos"), True, False),
    ],
)
def test_a_critique_is_truncated_where_its_length_ended_it(
    response: ScoredResponse, no_anchor: bool, truncated: bool, judge: Judge
) -> None:
    reading = read_response(judge.tokenizer, judge.scale, response, [0.5], renormalized=True)
    assert (reading.no_anchor, reading.truncated, reading.tokens) == (no_anchor, truncated, 1)
    assert (reading.answer is None) == (response.score_logprobs is None)

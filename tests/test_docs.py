"""Documents are in step with the code: generated ones are as generated, and what any text refers to exists."""

import ast
import importlib
import importlib.util
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, SeedOssConfig

from real_megatron.bridge import describe, parameters
from real_megatron.config import DataSource, RolloutConfig, RunConfig
from real_megatron.data import load_examples
from real_megatron.data.byte_model import make_byte_model
from real_megatron.errors import DataError, EngineError, PromptRefused, UnsupportedModel
from real_megatron.evaluation.weighted import NAMES, WITHIN
from real_megatron.hf.directory import load_tokenizer
from real_megatron.objective import (
    ReinforceObjective,
    ResponseView,
    RewardOptions,
    ScoredBatch,
    SupervisedObjective,
    Totals,
    find_reward,
    summarize,
)
from real_megatron.objective.rewards import compute_rewards
from real_megatron.rollout.engine import EngineSpec, SamplingParams
from real_megatron.rollout.factory import build_engine
from real_megatron.scores import Branch
from real_megatron.sections import describe_keys, section_type
from tests.support.documents import (
    CHECKS,
    ROOT,
    Text,
    dead_commands,
    dead_keys,
    dead_paths,
    differing_blocks,
    explained_metrics,
    forbidden_words,
    included_files,
    repository_texts,
    texts_of,
)
from tests.test_imports import ALLOWED

EXAMPLES = ROOT / "examples/extending"


# --- docs/architecture.md -----------------------------------------------------------------------------------------


def test_the_table_of_folders_is_that_of_the_import_test() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Folders, and what each may import")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `").removesuffix("/").removesuffix(".py"): re.findall(r"`(\w+)`", row[-1]) for row in rows}
    assert {part: set(targets) for part, targets in table.items()} == ALLOWED
    order = list(table)
    for part, targets in table.items():
        assert all(order.index(target) > order.index(part) for target in targets), f"{part} imports a row above it"


# --- generated documents ------------------------------------------------------------------------------------------


def test_the_configuration_reference_is_in_step() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == describe_keys(RunConfig), "run: python -m real_megatron.config > docs/configuration.md"


def test_every_key_has_a_description() -> None:
    sections, seen = [RunConfig], set()
    while sections:
        section = sections.pop()
        seen.add(section)
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            inner = section_type(field.annotation)
            if inner is not None and inner not in seen:
                sections.append(inner)


def api_reference() -> ModuleType:
    """tools/api_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "tools/api_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_reference_is_in_step() -> None:
    import real_megatron

    written = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert written == api_reference().reference(real_megatron), "run: python tools/api_reference.py > docs/api.md"


def test_the_api_reference_shows_what_users_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(
        '''
from dataclasses import dataclass
from typing import Literal

__all__ = ["__version__", "Judge", "LIMIT", "Kind", "Point", "lazy"]
Kind = Literal["a", "b"]
"""A choice."""
LIMIT = 3
__version__ = "7.8"

class Base:
    def inherited(self) -> int:
        """From the base."""
        return 0

class Judge(Base):
    """Asks.

    Twice."""

    hidden = 1

    def __init__(self, name: str, *, n: int = 1) -> None:
        """With
        names: that are none.
        name, n: of the judge. n: how
        many. Note: no parameter.

        name is repeated: here."""

    @classmethod
    def load(cls, path: str) -> "Judge":
        """From a file."""
        return cls(path)

    @property
    def size(self) -> int:
        """How large."""
        return 0

    def score(self, text: str) -> float:
        """A number."""
        return 0.0

    def _inside(self) -> None: ...

@dataclass
class Point:
    """A place."""

    x: float
    """Metres."""
    y: float = 0.0

def __getattr__(name: str) -> object:
    if name != "lazy":
        raise AttributeError(name)
    def lazy(a: int, *rest: str, b: float = 0.5, **more: object) -> None:
        """Loaded late."""
    return lazy
''',
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = api_reference().reference(importlib.import_module("toy"))
    for wanted in (
        "Judge(name: str, *, n: int = 1)",
        "Asks.\n\nTwice.",
        "With\nnames: that are none.\n\n- `name, n`: of the judge.\n- `n`: how many. Note: no parameter.\n\nname is",
        "Judge.load(path: str) -> Judge",
        "From a file.",
        "`size`: int",
        "Judge.score(text: str) -> float",
        "Judge.inherited() -> int",
        "lazy(a: int, *rest: str, b: float = 0.5, **more: object) -> None",
        "Loaded late.",
        "`x`: float",
        "Metres.",
        "`y`: float = 0.0",
        "`LIMIT` = 3",
    ):
        assert wanted in text, f"{wanted!r} is not in\n{text}"
    assert "_inside" not in text and "7.8" not in text
    del sys.modules["toy"]


# --- references ---------------------------------------------------------------------------------------------------


@cache
def all_texts() -> list[Text]:
    return list(repository_texts())


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_refers_to_what_does_not_exist(check: str) -> None:
    texts = [text for text in all_texts() if check != "blocks" or text.kind == "markdown"]
    faults = [fault for text in texts for fault in CHECKS[check](text)]
    assert not faults, "\n".join(faults)


def test_the_texts_are_those_that_people_read() -> None:
    kinds = {(text.file, text.kind) for text in all_texts()}
    for wanted in (
        ("README.md", "markdown"),
        ("docs/mathematics.md", "markdown"),
        ("benchmarks/results/head_cpu.md", "markdown"),
        ("real_megatron/errors.py", "docstring"),
        ("real_megatron/registry.py", "message"),
        ("real_megatron/config.py", "message"),
        ("examples/feedback_collection/real.yaml", "comment"),
        ("tests/run.sh", "comment"),
        ("tests/test_docs.py", "docstring"),
    ):
        assert wanted in kinds


def markdown(text: str) -> Text:
    return Text("docs/made_up.md", 1, text, "markdown")


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("see docs/gone.md.", ["docs/gone.md does not exist"]),
        ("fine\nrun `bash tools/gone.sh` now", ["tools/gone.sh does not exist"]),
        ("in `real_megatron/batch/gone.py`, real_megatron/batch/packing.py", ["real_megatron/batch/gone.py"]),
        ("below the package: `objective/gone.py`, `objective/rewards.py`", ["objective/gone.py does not exist"]),
        ("the folder examples/gone/, or examples/tiny_judge/", ["examples/gone/ does not exist"]),
        ("pytest tests/test_docs.py::test_gone", ["tests/test_docs.py has no test test_gone"]),
        ("tests/test_docs.py::test_every_key_has_a_description", []),
        ("[a](gone.md) [b](configuration.md) [c](https://example.org/docs/x)", ["the link gone.md leads nowhere"]),
        ("[a](configuration.md#gone) [b](configuration.md#configuration)", ["no heading #gone"]),
        ("# One & two\n[a](#one--two) [b](#three)", ["no heading #three"]),
        ("https://example.org/docs/x.md, tests/FOLDER/x, docs/<name>.md, tools/*.py, tests/…, rollout/reward", []),
        ("docs/NAME.json, benchmarks/results/NAME_cpu.md, docs/OTHER.md", ["docs/OTHER.md does not exist"]),
    ],
)
def test_a_dead_path_is_found(text: str, faults: list[str]) -> None:
    found = dead_paths(markdown(text))
    assert len(found) == len(faults) and all(want in have for want, have in zip(faults, found, strict=True)), found


def test_a_fault_names_file_and_line() -> None:
    assert dead_paths(markdown("one\ntwo\ndocs/gone.md")) == ["docs/made_up.md:3: docs/gone.md does not exist"]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("set rollout.gone=4", ["rollout.gone"]),
        ("`rollout.max_new_tokens` and `rollout.n`", ["rollout.max_new_tokens"]),
        ("data.train.0.gone, data.train.0.path", ["data.train.0.gone"]),
        ("data.train.first.path", ["data.train.first.path"]),
        ("data.eval.dev.gone, data.eval.dev.path", ["data.eval.dev.gone"]),
        ("data.*.gone, data.*.format", ["data.*.gone"]),
        ("objective.name.gone", ["objective.name.gone"]),
        ("checkpoint.save_hf=false weights in model.layers.0.x, metrics.jsonl, model.safetensors", []),
        ("objective.name=ppo objective.name=grpo objective.name=NAME", ["objective.name has no value ppo"]),
        ("```yaml\nrollout:\n  n: 4\n  gone: 1\n```", ["rollout.gone"]),
        ("```yaml\ndata:\n  train:\n    - path: a\n      gone: b\n```", ["data.train.0.gone"]),
    ],
)
def test_a_dead_key_is_found(text: str, faults: list[str]) -> None:
    found = dead_keys(markdown(text))
    assert len(found) == len(faults) and all(want in have for want, have in zip(faults, found, strict=True)), found


def test_a_dead_key_is_found_in_docstrings_comments_and_messages() -> None:
    source = '''"""Reads `rollout.gone`."""
x = 1  # rollout.gone
y = f"{x} is above rollout.gone"
"""Of `rollout.engine` and `metrics.merge`."""
z = "objective.rewards"
'''
    found = [fault for text in texts_of("real_megatron/made_up.py", source) for fault in dead_keys(text)]
    assert sorted(found) == [f"real_megatron/made_up.py:{n}: no configuration key rollout.gone" for n in (1, 2, 3)]
    comment = list(texts_of("examples/made_up.yaml", "seed: 0  # as rollout.gone\n"))
    assert [fault for text in comment for fault in dead_keys(text)]


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("`real-megatron gone x.yaml`", ["no command real-megatron gone"]),
        ("real-megatron train | gone | sft", ["no command real-megatron gone"]),
        ("torchrun -m real_megatron gone x.yaml", ["no command real-megatron gone"]),
        ("real-megatron convert gone A B", ["no command real-megatron convert gone"]),
        ("real-megatron convert to-megatron A B --gone 2", ["real-megatron convert to-megatron has no option --gone"]),
        ("real-megatron judge --model DIR --gone", ["real-megatron judge has no option --gone"]),
        ("real-megatron --traceback gone", ["no command real-megatron gone"]),
        ("real-megatron judge --model DIR --input a --output b --help, real-megatron … and real-megatron is", []),
    ],
)
def test_a_dead_command_is_found(text: str, faults: list[str]) -> None:
    assert [fault.partition(": ")[2] for fault in dead_commands(markdown(text))] == faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Source: DESIGN.md", ["DESIGN.md"]),
        ("see shared/data, not /dev/shared/data", ["shared/"]),
        ("conversion and the planner", ["the planner"]),
        ("torch's memory planner", []),
    ],
)
def test_words_that_lead_nowhere_are_found(text: str, words: list[str], tmp_path: Path) -> None:
    found = forbidden_words(markdown(text), tmp_path)
    assert len(found) == len(words) and all(word in fault for word, fault in zip(words, found, strict=True))


# --- docs/reading_a_run.md ----------------------------------------------------------------------------------------


def metrics_of_objectives() -> set[str]:
    """What objectives report, with all their terms."""
    scored = ScoredBatch(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([0, 1]),
        torch.full((2, 2), 0.5).log(),
        torch.tensor([True, True]),
        torch.tensor([1.0, 2.0]),
        torch.tensor([0, 0]),
        torch.tensor([1.0, 2.0]),
        old_logprobs=torch.tensor([-1.0, -2.0]),
        ref_logprobs=torch.tensor([-1.0, -2.0]),
    )
    rl = ReinforceObjective(find_reward("real"), kl=0.1, ratio="ppo")
    return {
        name
        for objective in (rl, SupervisedObjective(squared=1.0))
        for name in summarize(objective(scored, Totals(1, 2, 2))[1])
    }


def test_the_metrics_that_are_explained_are_those_that_code_writes() -> None:
    explained = explained_metrics()
    written = metrics_of_objectives() | {f"cot/distinct_{n}" for n in (1, 2, 3)}
    written |= {f"eval/NAME/DECODING/{name}" for name in (*NAMES, *WITHIN)}
    assert written <= explained, sorted(written - explained)
    places = ("rollout/sampling.py", "training/*.py", "policy/p*.py", "judging/evaluate.py")
    words = {
        node.value
        for place in places
        for path in (ROOT / "real_megatron").glob(place)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant)
    }
    rest = explained - written
    gone = {name for name in rest if not {name, re.sub(r"^(rollout|seconds|eval/NAME)/", "", name)} & words}
    assert not gone, sorted(gone)


def test_the_text_about_runs_names_explained_metrics_only() -> None:
    text = (ROOT / "docs/reading_a_run.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:rollout|rewards|cot|mismatch|seconds|eval)/\w[\w/]*)`", text))
    assert len(named) > 40 and named <= explained_metrics() | {"rollout/"}, sorted(named - explained_metrics())


# --- docs/extending.md --------------------------------------------------------------------------------------------


def test_a_block_that_differs_from_its_file_is_found() -> None:
    same = f"```python examples/extending/reward.py\n{(EXAMPLES / 'reward.py').read_text(encoding='utf-8')}```\n"
    assert differing_blocks(markdown(same)) == []
    assert len(differing_blocks(markdown(same.replace("absolute", "relative")))) == 1
    assert len(differing_blocks(markdown("```python examples/gone.py\n```"))) == 1


def test_the_document_shows_every_example() -> None:
    path = ROOT / "docs/extending.md"
    shown = included_files(Text("docs/extending.md", 1, path.read_text(encoding="utf-8"), "markdown"))
    assert set(shown) == {f"examples/extending/{p.name}" for p in EXAMPLES.glob("*.py")}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PYTHONPATH=examples/extending`."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.usefixtures("examples")
def test_the_reward_of_the_document_runs() -> None:
    options, values = RewardOptions(probabilities="renormalized"), torch.tensor([1.0, 2.0])
    logprobs = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]).log().requires_grad_()
    labels, answered = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([True, True, False])
    reward = find_reward("reward:absolute")
    r = compute_rewards(reward, logprobs, answered, values, labels, options)
    torch.testing.assert_close(r, torch.tensor([-0.25, -0.5, -2.0]))  # the floor: 0 counts as a value
    r.sum().backward()
    assert logprobs.grad is not None and logprobs.grad[0].abs().sum() > 0 and logprobs.grad[2].abs().sum() == 0
    views = [ResponseView("good", {}), ResponseView("w " * 500, {}), ResponseView("", {})]
    brief = compute_rewards(find_reward("reward:brief"), logprobs, answered, values, labels, options, responses=views)
    torch.testing.assert_close(brief.detach(), torch.tensor([-0.251, -1.0, -3.0]))


@pytest.mark.usefixtures("examples")
def test_the_format_of_the_document_runs(tmp_path: Path) -> None:
    file = tmp_path / "reviews.jsonl"
    rows = [{"question": "Why?", "answer": "So.", "stars": [2, 4], "review": "Thin."}, {"question": "a", "answer": "b"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = DataSource(format="format:stars", path=str(file), limit=1)
    (example,) = load_examples(source, values=[1.0, 5.0])
    assert (example.label, example.cot, example.meta) == (3.0, "Thin.", {"question": "Why?"})
    assert example.messages[0]["content"].startswith("Question: Why?\nAnswer: So.")
    with pytest.raises(DataError, match=r"reviews.jsonl, line 2: no stars"):
        load_examples(source.model_copy(update={"limit": None}))


@pytest.mark.usefixtures("examples")
def test_the_engine_of_the_document_runs(tmp_path: Path) -> None:
    model_dir = make_byte_model(tmp_path / "model")
    tokenizer = load_tokenizer(model_dir)

    def spec(name: str, serve_loaded: bool = True) -> EngineSpec:
        config = RolloutConfig(engine=name)
        return EngineSpec(config, model_dir, tokenizer, tmp_path, 16, 8, serve_loaded=serve_loaded)

    engine, known = build_engine(spec("engine:plain")), build_engine(spec("transformers"))
    prompts, watch = [[72, 105], [33]], (49, 50)
    torch.testing.assert_close(
        engine.branch_logprobs(prompts, [Branch((), tuple(watch))]),
        known.branch_logprobs(prompts, [Branch((), tuple(watch))]),
        rtol=0,
        atol=1e-5,
    )
    params = SamplingParams(n=2, temperature=0.8, top_p=0.9, max_new_tokens=4, watch_ids=watch)
    groups = engine.generate(prompts, params, seeds=[1, 2])
    assert groups == engine.generate(prompts, params, seeds=[1, 2])
    for group in groups:
        assert len(group) == 2
        for response in group:
            assert len(response.token_ids) == len(response.logprobs) == len(response.watched or []) <= 4
            assert response.weight_version == 0 and max(response.logprobs) < 0
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    ours, theirs = engine.generate(prompts, greedy), known.generate(prompts, greedy)
    assert [g[0].token_ids for g in ours] == [g[0].token_ids for g in theirs]
    torch.testing.assert_close(ours[0][0].logprobs, theirs[0][0].logprobs, rtol=0, atol=1e-5)
    stop = tokenizer.decode(ours[0][0].token_ids[:2])
    stopped = engine.generate(prompts[:1], SamplingParams(temperature=0, max_new_tokens=6, stop=(stop,)))[0][0]
    assert (stopped.token_ids, stopped.finish_reason) == (ours[0][0].token_ids[:2], "stop")
    with pytest.raises(PromptRefused) as refused:
        engine.generate([[33], [33] * 21], greedy)
    assert refused.value.index == 1

    fresh = build_engine(spec("engine:plain", serve_loaded=False))
    with pytest.raises(EngineError, match="update_weights"):
        fresh.generate(prompts, greedy)
    fresh.update_weights(AutoModelForCausalLM.from_pretrained(model_dir).named_parameters(), version=3)
    again = fresh.generate(prompts, greedy)
    assert [g[0].token_ids for g in again] == [g[0].token_ids for g in ours] and again[0][0].weight_version == 3
    for each in (engine, known, fresh):
        each.close()


@pytest.mark.usefixtures("examples")
def test_the_family_of_the_document_runs() -> None:
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = SeedOssConfig(**sizes, num_key_value_heads=2, head_dim=8)
    description = describe(config, "family:seed_oss")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table = {name: shape for parameter in parameters(description) for name, shape in parameter.hf_shapes.items()}
    assert table == expected
    by_model_type = describe(config)  # registered: found by its model_type from now on
    assert by_model_type.transformer_config == description.transformer_config
    with pytest.raises(UnsupportedModel, match="other biases"):
        describe(SeedOssConfig(**sizes, mlp_bias=True), "family:seed_oss")

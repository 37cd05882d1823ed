"""CoTs sampled before training belong to their examples and settings, and survive every character."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from real_megatron.config import RunConfig
from real_megatron.data import load_examples
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.rollout.engine import Response
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError
from real_megatron.training import generated_cots
from real_megatron.training.generated_cots import FILE, with_generated_cots
from real_megatron.training.serving import Served
from tests.support.rollout_fakes import ScriptedEngine

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    """Two data sets in files of one name: their examples have the same default ids."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        row = {"prompt": f"of {name}", "label": 1 if name == "a" else 5}
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    paths = [f"data.train.{i}.path={tmp_path}/{name}/train.jsonl" for i, name in enumerate("ab")]
    fixed = ["objective.name=tract", "sft.cots=generated", "sft.cot_model=writer", f"output={tmp_path}/run"]
    return RunConfig.from_yaml(None, [*paths, *fixed, *overrides])


class InTurn(ScriptedEngine):
    """The prepared responses one after another, over all calls; then it fails."""

    def generate(self, prompts, params, seeds=None):
        return [self.responses.pop(0) for _ in prompts]


def sampled(config: RunConfig, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
    """Prompt, label and CoT of every example, when the model writes `texts`, one to a prompt."""
    responses = [[Response(list(text.encode()), [-1.0] * len(text.encode()), "stop", 0)] for text in texts]

    @contextmanager
    def served(*_) -> Iterator[Served]:
        scale = ScoreScale.resolve(TOKENIZER, config.scale.scores, config.scale.values, config.scale.anchor)
        yield Served(InTurn(responses), TOKENIZER, scale)

    monkeypatch.setattr(generated_cots, "served", served)
    examples = [e for source in config.data.train for e in load_examples(source)]
    found = with_generated_cots(config, examples)
    return [(e.messages[0]["content"], e.label, e.cot) for e in found]


def test_each_cot_stays_with_its_example_whatever_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    texts = ["one\u2028line\x85 \x0b.\r\n[RESULT] ", "good .[RESULT] "]
    want = [("of a", 1.0, "one\u2028line\x85 \x0b."), ("of b", 5.0, "good .")]
    assert sampled(config, texts, monkeypatch) == want
    # Kept: a second run samples nothing, and no other CoTs.
    assert sampled(config, ["never[RESULT] "] * 2, monkeypatch) == want


def test_an_interrupted_run_goes_on_behind_its_last_whole_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_cots, "CHUNK", 1)
    config = config_of(tmp_path)
    with pytest.raises(IndexError):  # in the second chunk
        sampled(config, ["first .[RESULT] "], monkeypatch)
    partial = (config.output / FILE).with_suffix(".partial")
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"example": 1, "id": "half')
    # The first is not sampled again.
    want = [("of a", 1.0, "first ."), ("of b", 5.0, "second .")]
    assert sampled(config, ["second .[RESULT] "], monkeypatch) == want
    assert not partial.exists() and sampled(config, [], monkeypatch) == want


def test_chunks_of_other_settings_are_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated_cots, "CHUNK", 1)
    with pytest.raises(IndexError):
        sampled(config_of(tmp_path), ["old .[RESULT] "], monkeypatch)
    new = sampled(config_of(tmp_path, "rollout.temperature=0.5"), ["new a.[RESULT] ", "new b.[RESULT] "], monkeypatch)
    assert [cot for _, _, cot in new] == ["new a.", "new b."]


def test_cots_of_other_settings_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled(config_of(tmp_path), ["x[RESULT] "] * 2, monkeypatch)
    sampled(config_of(tmp_path, "optimizer.lr=1e-3"), [], monkeypatch)  # decides nothing about them
    for override, message in (
        ("sft.cot_model=another", "sft.cot_model was 'writer', is 'another'"),
        ("rollout.temperature=0.5", "rollout.temperature was 1.0, is 0.5"),
        ("data.train.0.limit=1", "data.train was"),
    ):
        with pytest.raises(ConfigError, match="sampled with other settings") as error:
            sampled(config_of(tmp_path, override), [], monkeypatch)
        assert message in str(error.value)


def test_a_model_that_never_writes_the_anchor_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match=r"writer wrote no CoT with the anchor '\[RESULT\] ' to 2 prompts"):
        sampled(config, ["none", "neither"], monkeypatch)
    assert not (config.output / FILE).exists()

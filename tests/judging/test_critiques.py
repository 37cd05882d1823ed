"""Written critiques belong to their examples and settings, survive every character, and are data that SFT reads."""

import json
import os
from pathlib import Path

import pytest

from real_megatron.config import RunConfig
from real_megatron.data import load_examples
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.errors import ConfigError
from real_megatron.judging import critiques
from real_megatron.judging.critiques import write_critiques
from real_megatron.judging.judge import Judge
from real_megatron.locks import only_writer
from real_megatron.rollout.engine import Response, SamplingParams
from real_megatron.scores import ScoreScale
from tests.support.rollout_fakes import ScriptedEngine

TOKENIZER = byte_tokenizer()


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    """Two data sets in files of one name: their examples have the same default ids."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        row = {"prompt": f"of {name}", "label": 1 if name == "a" else 5, "source": name}
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    paths = [f"data.train.{i}.path={tmp_path}/{name}/train.jsonl" for i, name in enumerate("ab")]
    return RunConfig.from_yaml(None, [*paths, f"output={tmp_path}/run", *overrides])


class InTurn(ScriptedEngine):
    """The prepared responses one after another, over all calls; then it fails. Remembers seeds and parameters."""

    def generate(self, prompts, params, seeds=None):
        self.used += seeds
        self.sampled.append(params)
        return [self.responses.pop(0) for _ in prompts]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """write(config, texts, model): the rows when the model writes `texts`, one to a prompt; `write.seeds`,
    `write.params`: all used."""
    output = tmp_path / "cots.jsonl"

    def call(config: RunConfig, texts: list[str], model: str = "writer") -> list[tuple[str, float, str]]:
        responses = [[Response(list(text.encode()), [-1.0] * len(text.encode()), "stop", 0)] for text in texts]
        scale = ScoreScale.resolve(TOKENIZER, config.scale.scores, config.scale.values, config.scale.anchor)
        engine = InTurn(responses)
        engine.used, engine.sampled = call.seeds, call.params
        judge = Judge(engine, TOKENIZER, scale, config)
        monkeypatch.setattr(Judge, "from_pretrained", lambda *_, **__: judge)
        count = write_critiques(config, model, output)
        source = config.data.train[0].model_copy(update={"path": str(output)})
        found = load_examples(source)
        assert count == len(found)
        return [(e.messages[0]["content"], e.label, e.cot) for e in found]

    call.seeds, call.params = [], []
    return call


def test_critiques_are_sampled_as_configured(write, tmp_path: Path) -> None:
    settings = ["rollout.temperature=0.7", "rollout.top_p=0.9", "data.max_response_tokens=33"]
    texts = ["x[RESULT] "] * 2
    write(config_of(tmp_path, "seed=1", *settings), texts)
    assert write.params == [SamplingParams(1, 0.7, 0.9, 33, stop=("[RESULT] ",))]
    (tmp_path / "cots.jsonl").unlink()
    write(config_of(tmp_path, "seed=2", *settings), texts)
    assert len(set(write.seeds)) == 4, "each prompt and each seed of the run has its own"


def test_each_critique_stays_with_its_example_whatever_is_in_it(write, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    texts = ["one\u2028line\x85 \x0b.\r\n[RESULT] ", "good .[RESULT] "]
    want = [("of a", 1.0, "one\u2028line\x85 \x0b."), ("of b", 5.0, "good .")]
    assert write(config, texts) == want
    rows = [json.loads(line) for line in (tmp_path / "cots.jsonl").read_text().split("\n") if line]
    assert [(row["id"], row["source"]) for row in rows] == [("0/train-1#0", "a"), ("1/train-1#0", "b")]
    # Complete: a second call samples nothing, and no other critiques.
    assert write(config, ["never[RESULT] "] * 2) == want


def test_critiques_that_the_data_have_are_not_read(write, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    Path(config.data.train[0].path).write_text('{"prompt": "of a", "label": 1, "cot": ["no", "text"]}')
    want = [("of a", 1.0, "one ."), ("of b", 5.0, "two .")]
    assert write(config, ["one .[RESULT] ", "two .[RESULT] "]) == want


def test_an_interrupted_job_goes_on_behind_its_last_whole_chunk(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critiques, "CHUNK", 1)
    config = config_of(tmp_path)
    with pytest.raises(IndexError):  # in the second chunk
        write(config, ["first .[RESULT] "])
    partial = tmp_path / "cots.jsonl.partial"
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"id": "half')
    # The first is not sampled again.
    want = [("of a", 1.0, "first ."), ("of b", 5.0, "second .")]
    assert write(config, ["second .[RESULT] "]) == want
    assert not partial.exists() and write(config, []) == want
    assert len(set(write.seeds)) == 2, "each prompt has a seed of its own, also in the second chunk"


@pytest.mark.parametrize("finished", [True, False])
def test_a_job_of_other_settings_is_refused_by_name(
    finished: bool, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critiques, "CHUNK", 1)
    if finished:
        write(config_of(tmp_path), ["x[RESULT] "] * 2)
        write(config_of(tmp_path, "optimizer.lr=1e-3"), [])  # decides nothing about them
    else:
        with pytest.raises(IndexError):
            write(config_of(tmp_path), ["old .[RESULT] "])
    for model, override, message in (
        ("another", "seed=0", "model was 'writer', is 'another'"),
        ("writer", "rollout.temperature=0.5", "rollout.temperature was 1.0, is 0.5"),
        ("writer", "data.train.0.limit=1", "data.train was"),
    ):
        with pytest.raises(ConfigError, match="begun with other settings") as error:
            write(config_of(tmp_path, override), [], model)
        assert message in str(error.value)


def test_data_whose_content_changed_is_other_data(write, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write(config, ["x[RESULT] "] * 2)
    file = Path(config.data.train[0].path)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ConfigError, match="data_digests was"):
        write(config, [])


def test_a_model_that_was_trained_anew_is_another(write, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model/model.safetensors"
    weights.touch()
    write(config_of(tmp_path), ["x[RESULT] "] * 2, str(weights.parent))
    os.utime(weights, (1e9, 1e9))
    with pytest.raises(ConfigError, match="weights_written was"):
        write(config_of(tmp_path), [], str(weights.parent))


def test_a_model_that_never_writes_the_anchor_is_named_and_leaves_nothing(write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"writer wrote no critique with the anchor '\[RESULT\] '"):
        write(config_of(tmp_path), ["none", "neither"])
    assert not (tmp_path / "cots.jsonl").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_full_is_one_line_that_names_the_file() -> None:
    with pytest.raises(OSError, match=r"/dev/full: cannot be written \(No space left .*: make room there, and run"):
        critiques._append(Path("/dev/full"), [{"id": "a"}])


def test_two_jobs_into_one_file_are_one_too_many(write, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with only_writer(tmp_path / "cots.jsonl"), pytest.raises(ConfigError, match="is being written by another job"):
        write(config, ["one .[RESULT] ", "two .[RESULT] "])
    assert not write.seeds and write(config, ["one .[RESULT] ", "two .[RESULT] "])


def test_without_data_there_is_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.train is empty"):
        write_critiques(RunConfig(), "writer", tmp_path / "cots.jsonl")

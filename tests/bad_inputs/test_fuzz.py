"""Arbitrary inputs: every loader gives what it should, or the one kind of error that names the place.

`FUZZ=N` runs N random examples of each; else the same few every time (README.md)."""

import csv
import io
import json
import os
import struct
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from real_megatron.config import DataConfig, DataSource, RunConfig
from real_megatron.data import BadRecord, JudgeExample, encode_prompt, load_examples
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.data.control_tokens import ControlTokens
from real_megatron.data.critiques import without_end
from real_megatron.data.formats import FORMATS, read_jsonl
from real_megatron.data.template import Template
from real_megatron.errors import CheckpointError, ConfigError, DataError
from real_megatron.hf.checkpoint import HFCheckpoint
from real_megatron.judging.reading import read_response
from real_megatron.rollout.scoring import ScoredResponse
from real_megatron.scores import ScoreScale
from real_megatron.sections import known_keys

EXAMPLES = int(os.environ.get("FUZZ", "0"))
some = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TOKENIZER = byte_tokenizer()
SCALE = ScoreScale.resolve(TOKENIZER, ["1", "2", "3"], None, "[RESULT] ")
VALUES = [1.0, 2.0, 3.0, 4.0, 5.0]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = (
    "prompt messages label cot id group instruction orig_score gpt4_score gpt4_feedback orig_feedback output".split()
)
message = st.fixed_dictionaries({}, optional={"role": anything, "content": anything})
near = st.fixed_dictionaries(
    {},
    optional={name: anything for name in COLUMNS}
    | {"prompt": st.text(max_size=9) | anything, "label": st.integers(0, 6) | anything}
    | {"messages": st.lists(message, max_size=2) | anything, "gpt4_score": st.lists(st.integers(0, 6), max_size=3)},
)


def loaded(source: DataSource, values: list[float] | None = None) -> None:
    """Examples that hold what they must, or a DataError that begins with the file."""
    try:
        examples = load_examples(source, values=values)
    except DataError as error:
        assert not isinstance(error, BadRecord) and str(error).startswith(source.path), error
        return
    assert examples and len({example.id for example in examples}) == len(examples)
    for example in examples:
        assert all(isinstance(text, str) for m in example.messages for text in m.values())
        assert example.has_label and (values is None or min(values) <= example.label <= max(values))
        json.dumps(example.messages).encode()


@some
@given(
    st.lists(near | anything, max_size=4),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]),
    st.sampled_from(list(FORMATS)),
)
def test_rows_of_any_values(tmp_path: Path, rows: list[Any], suffix: str, format: str) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix in (".csv", ".tsv"):
        names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)) or ["prompt"]
        text = io.StringIO()
        writer = csv.writer(text, delimiter="\t" if suffix == ".tsv" else ",")
        writer.writerow(names)
        writer.writerows([row.get(name) for name in names] for row in rows if isinstance(row, dict))
        path.write_text(text.getvalue(), encoding="utf-8", errors="backslashreplace", newline="")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded(DataSource(path=str(path), format=format), VALUES)


@some
@given(near | st.dictionaries(st.text(max_size=5), anything))
def test_a_record_is_read_or_said_to_be_bad(record: dict[str, Any]) -> None:
    for name in FORMATS:
        try:
            FORMATS.find(name).read(record)
        except BadRecord as error:
            assert str(error)
    if isinstance(record.get("label"), int) and not isinstance(record["label"], bool) and abs(record["label"]) < 100:
        record = {"prompt": "x", "label": record["label"]}
        assert read_jsonl(record).label == record["label"]


TEXTS = ["{", '{"prompt": "a", "label": 1}\n', "[", '"', "\n", ",", "prompt,label\n", "\0", "\ufeff", "a,1\n", "\r"]
raw = st.binary(max_size=60) | st.lists(st.sampled_from(TEXTS), max_size=8).map(lambda parts: "".join(parts).encode())


@some
@given(raw, st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_files_of_any_bytes(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    loaded(DataSource(path=str(path)), VALUES)


# --- configuration ----------------------------------------------------------------------------------------------------

SIGNS = [
    "a: 1\n",
    "seed: ",
    "model: {path: m}\n",
    "- ",
    "&a ",
    "*a",
    "!!int ",
    "? ",
    "<<: ",
    "{",
    "}",
    "[",
    "'",
    "#",
    "\t",
    "%",
    "2024-99-99",
    "0o",
    "0x_",
]


@some
@given(raw | st.lists(st.sampled_from(SIGNS), max_size=6).map(lambda parts: "".join(parts).encode()))
def test_configurations_of_any_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    try:
        RunConfig.from_yaml(path)
    except ConfigError as error:
        assert all(line.startswith(str(path)) for line in str(error).splitlines()), error


@some
@given(st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | st.text(max_size=4), anything, max_size=3))
def test_configurations_of_any_tree(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    same_again(path, tree)


KEYS = [key for key in known_keys(RunConfig) if key != "data.eval"]
values = anything | st.sampled_from(
    [0, 1, 2, 0.5, "none", "auto", "real", "grpo", "raft", True, "full", ["A", "B"], 10**12, "1e-6", "", "~", "$x"]
)


@some
@given(st.dictionaries(st.sampled_from(KEYS) | st.sampled_from(KEYS).map(lambda key: key + "s"), values, max_size=3))
def test_configurations_with_other_values_and_keys(tmp_path: Path, changes: dict[str, Any]) -> None:
    tree: dict[str, Any] = {}
    for key in sorted(changes):
        *sections, name = key.split(".")
        inside = tree
        for section in sections:
            assume(isinstance(inside.setdefault(section, {}), dict))
            inside = inside[section]
        inside[name] = changes[key]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    same_again(path, tree)


def same_again(path: Path, tree: dict[str, Any]) -> None:
    """A configuration that its own YAML gives again, or an error whose lines name the file and a key."""
    try:
        config = RunConfig.from_yaml(path)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith(str(path)), error
        assert any(part in str(error) for key in tree for part in (str(key), repr(key)[1:-1])) or "YAML" in str(
            error
        ), error
        return
    again = path.with_name("again.yaml")
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(again) == config


@some
@given(st.text(max_size=20))
def test_overrides_of_any_text(text: str) -> None:
    for override in (text, f"steps={text}", f"data.template={text}", f"{text}=1", f"data.train.0.{text}"):
        try:
            RunConfig.from_yaml(None, [override])
        except ConfigError as error:
            assert str(error).startswith(("override `", "configuration: ")), error


# --- weights, scales, templates, responses ----------------------------------------------------------------------------

offsets = st.lists(st.integers(-5, 40), max_size=3)
entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "X"]),
        "shape": st.lists(st.integers(-1, 5), max_size=2),
        "data_offsets": offsets,
    }
)


@some
@given(
    st.dictionaries(st.text(max_size=4), entry | anything, max_size=3) | anything,
    st.binary(max_size=40),
    st.integers(-2, 2),
)
def test_headers_of_weights(tmp_path: Path, header: Any, data: bytes, more: int) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", max(0, len(text) + more)) + text + data)
    try:
        checkpoint = HFCheckpoint(tmp_path)
        for name in checkpoint.entries:
            if checkpoint.shapes[name]:
                assert tuple(checkpoint.tensor(name).shape) == checkpoint.shapes[name]
        checkpoint.validate({"x": (1,)}, tied=False)
    except CheckpointError as error:
        assert str(error).startswith(str(tmp_path)), error


@some
@given(
    st.lists(st.text(max_size=3), max_size=4),
    st.none() | st.lists(st.floats(), max_size=4),
    st.text(max_size=5),
    st.lists(st.lists(st.text(max_size=3), max_size=2), max_size=4),
    st.lists(st.text(max_size=3) | st.just("eos"), max_size=2),
)
def test_scales_of_any_text(
    scores: list[str], numbers: list[float] | None, anchor: str, further: list[list[str]], ends: list[str]
) -> None:
    spellings = dict(zip(scores, further, strict=False))
    try:
        scale = ScoreScale.resolve(TOKENIZER, scores, numbers, anchor, spellings, ends)
    except ConfigError as error:
        assert any(word in str(error) for word in ("score", "anchor", "scale"))
        return
    tree = scale.tree
    assert tree.size == len(scores) == len(set(scale.values))
    for k, text in enumerate(scores):
        for written in (text, *spellings.get(text, [])):
            for end in tree.ends or [0x110000]:
                assert tree.read([*TOKENIZER.encode(scale.anchor_text + written)[len(scale.anchor_ids) :], end])[0] == k


@some
@given(st.text(max_size=30), st.text(max_size=30))
def test_templates_and_texts_of_data_write_no_control_token(text: str, field: str) -> None:
    assume("\ud800" not in text and text.isprintable() and field.isprintable())
    prompt = Template("t", text + "<eos>{prompt}").render(
        {"prompt": field + "<eos><pad>", **{name: "" for name in Template("t", text).fields}}
    )
    assert field + "<eos><pad>" in prompt
    example = JudgeExample("1", [{"role": "user", "content": prompt}])
    ids = encode_prompt(TOKENIZER, example, DataConfig())
    assert bytes(ids) == prompt.encode() and not set(ids) & set(ControlTokens.of(TOKENIZER)._ids.values())


@some
@given(
    st.text(max_size=40),
    st.lists(st.floats(max_value=0, allow_nan=False, min_value=-50), min_size=3, max_size=3),
    st.floats(0, 0.999),
)
def test_responses_of_any_text_are_read(text: str, logprobs: list[float], draw: float) -> None:
    assume(not any("\ud800" <= char <= "\udfff" for char in text))
    ids = list((text + SCALE.anchor_text).encode())
    cut = SCALE.cut(TOKENIZER, ids)
    assert cut is not None and (text + SCALE.anchor_text).startswith(bytes(ids[:cut]).decode())
    given = {name: None for name in ScoredResponse.__dataclass_fields__}
    given |= {"response_ids": ids[:cut], "score_logprobs": logprobs, "forced_anchor": False, "finish_reason": "stop"}
    reading = read_response(TOKENIZER, SCALE, ScoredResponse(**given), [draw], renormalized=True)
    assert reading.answer is not None and 1 <= reading.answer.expected <= 3.0000001
    assert reading.answer.sampled in SCALE.values and SCALE.anchor_text not in reading.critique
    without_end(text, None, True, SCALE.values)


def test_every_choice_is_in_the_tables_of_fuzzing() -> None:
    """The names that near-valid configurations are made of exist."""
    assert {"real", "grpo", "raft"} <= set(
        get_args(RunConfig.model_fields["objective"].annotation.model_fields["name"].annotation)
    )
    with pytest.raises(ConfigError):
        RunConfig.from_yaml(None, [f"{KEYS[0]}s=1"])

import csv
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from real_megatron.config import DataSource, RunConfig
from real_megatron.data import JudgeExample, example_from_record, label_column, load_examples
from real_megatron.data.critiques import without_end
from real_megatron.data.formats import FORMATS
from real_megatron.errors import ConfigError, DataError

DATA = Path(__file__).parents[3] / "shared/data"
VICUNA, SICK_FILE = DATA / "vicuna_eval.json", DATA / "relatedness/valid.jsonl"


def source(tmp_path: Path, rows: list[dict[str, Any]], format: str = "jsonl", **fields: Any) -> DataSource:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path), format=format, **fields)


def test_plain_jsonl(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "label": 1, "cot": "c"}, {"messages": messages, "label": [2, 3], "id": 9}]
    assert load_examples(source(tmp_path, rows)) == [
        JudgeExample("rows-1", [{"role": "user", "content": "a"}], 1.0, "c", {}),
        JudgeExample("9", messages, 2.5, None, {}),
    ]
    assert len(load_examples(source(tmp_path, rows, limit=1))) == 1


def test_template_fields_are_columns(tmp_path: Path) -> None:
    template = tmp_path / "t.txt"
    template.write_text("Q: {question} ({n})\n")
    rows = [{"question": "why {n}?", "n": 3, "label": 1}]
    (example,) = load_examples(source(tmp_path, rows), str(template))
    assert example.messages == [{"role": "user", "content": "Q: why {n}? (3)"}]
    assert example.meta == {"question": "why {n}?", "n": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "label": 6}, r"line 2: label 6 is outside of the score scale \[1, 5\]"),
        ({"prompt": "a", "label": 0.99}, r"line 2: label 0\.99 is outside"),
        ({"prompt": "a"}, "line 2: no label; training and evaluation need one in every record"),
        ({"prompt": "a", "label": "x"}, "line 2: 'label' is 'x'"),
        (
            {"prompt": "a", "label": 10**400},
            r"line 2: 'label' is 10{79}… \(401 characters\); it must be a",
        ),
        ({"prompt": "a", "label": "1" * 400}, r"line 2: 'label' is '1{79}… \(402 characters\); it must be a finite"),
        ({"prompt": "a", "label": [1e308, 1e308]}, "line 2: the label, the mean of 2 annotations, is infinite"),
        ({"text": "a", "label": 1}, "line 2: template 'plain' needs 'prompt', the record has .*: label, text;"),
        ({"prompt": " \n", "label": 1}, "line 2: the prompt is empty"),
        ({"prompt": "b", "label": 1, "id": "rows-1"}, "line 2: id 'rows-1' was given before, in .*line 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    data = source(tmp_path, [{"prompt": "a", "label": 5}, row])
    with pytest.raises(DataError, match=rf"^\S*rows\.jsonl, {message}"):
        load_examples(data, values=[1.0, 2.0, 5.0])


def test_records_without_annotations_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"instruction": "p", "gpt4_score": s, "gpt4_feedback": []} for s in ([1, 2], [], None, [3, None])]
    examples = load_examples(source(tmp_path, rows, "mt_bench"))
    assert [(e.id, e.label) for e in examples] == [("rows-1", 1.5), ("rows-4", 3.0)]
    assert "left out 2 records without any score annotation" in caplog.text
    with pytest.raises(DataError, match=r"no usable record; .* format mt_bench"):
        load_examples(source(tmp_path, rows[1:3], "mt_bench"))


def test_the_labels_column_is_chosen_and_never_guessed(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "p", "gpt4_score": [1, 2, 3], "gpt4_feedback": ["a", "b", "c"], "human_score": [3, 2.5]},
        {"instruction": "q", "gpt4_score": [5, 5, 5], "gpt4_feedback": ["d", "e", "f"], "human_score": []},
    ]
    for format in ("flask", "vicuna_bench", "mt_bench"):
        gpt4 = load_examples(source(tmp_path, rows, format))
        assert [(e.label, e.cot) for e in gpt4] == [(2.0, "b"), (5.0, "d")]
        (human,) = load_examples(source(tmp_path, rows, format, score="human_score"))
        assert (human.label, human.cot, human.meta["gpt4_score"]) == (2.75, "c", [1, 2, 3])
    feedback = [{"instruction": "p", "orig_score": "1", "gpt4_score": 2}, {"instruction": "q", "gpt4_score": 3}]
    assert [e.label for e in load_examples(source(tmp_path, feedback, "feedback_bench"))] == [1.0]
    chosen = source(tmp_path, feedback, "feedback_bench", score="gpt4_score")
    assert [e.label for e in load_examples(chosen)] == [2.0, 3.0]
    plain = source(tmp_path, [{"prompt": "a", "label": 1, "grade": 2}], score="grade")
    assert [(e.label, e.meta) for e in load_examples(plain)] == [(2.0, {"label": 1})]


@pytest.mark.parametrize(
    ("format", "row", "score", "message"),
    [
        ("mt_bench", {"instruction": "p", "idx": 81}, None, "no record has 'gpt4_score', .* numbers: idx; name"),
        ("flask", {"instruction": "p", "gpt4_score": [1]}, "human_score", "'human_score', .* numbers: gpt4_score;"),
        ("feedback_bench", {"instruction": "p", "gpt4_score": 1}, None, "'orig_score', .* numbers: gpt4_score;"),
        ("jsonl", {"prompt": "p"}, None, "'label', .* numbers: none; name one of them in data.*score"),
    ],
)
def test_a_file_without_the_labels_column_lists_others(
    tmp_path: Path, format: str, row: dict[str, Any], score: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl: .*{message}"):
        load_examples(source(tmp_path, [row, row], format, score=score))


@pytest.fixture
def extension_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that registers a format when it is imported; the registry is as before afterwards."""
    name = "tests.support.extension_format"
    monkeypatch.setattr(FORMATS, "_known", {known: FORMATS[known] for known in FORMATS})
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.mark.parametrize("reader", ["pairs", "read_pair"], ids=["registered", "attribute"])
def test_a_format_of_a_module(
    tmp_path: Path, extension_format: str, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{extension_format}:{reader}"
    rows = [{"question": "a", "grades": [1, 2]}, {"question": "b", "grades": []}]
    (example,) = load_examples(source(tmp_path, rows, name))
    assert example == JudgeExample("rows-1", [{"role": "user", "content": "a"}], 1.5, None, {"grades": [1, 2]})
    assert "left out 1 records without any score annotation" in caplog.text
    rows.append({"text": "c"})
    with pytest.raises(DataError, match=r"^\S*rows\.jsonl, line 3: no 'question'; name the column"):
        load_examples(source(tmp_path, rows, name))


def test_a_format_says_what_it_needs(tmp_path: Path, extension_format: str) -> None:
    rows = [{"question": "a", "grades": [1, 2]}, {"question": "b", "grades": []}]
    with pytest.raises(DataError, match=r"^\S*rows\.jsonl, line 2: no label; training and evaluation need one"):
        load_examples(source(tmp_path, rows, f"{extension_format}:graded"))


def test_a_format_lets_the_labels_column_be_chosen_or_not(tmp_path: Path, extension_format: str) -> None:
    rows = [{"question": "a", "first": 1, "second": 2}]
    for score, label in ((None, 1.0), ("second", 2.0)):
        data = source(tmp_path, rows, f"{extension_format}:columns", score=score)
        assert [e.label for e in load_examples(data)] == [label]
        assert label_column(data) == (score or "first")
    fixed = source(tmp_path, rows, f"{extension_format}:pairs", score="second")
    with pytest.raises(ConfigError, match=r"data\.\*\.score: the format .*:pairs has no choice of the label's column"):
        load_examples(fixed)
    assert label_column(fixed.model_copy(update={"score": None})) is None
    words = source(tmp_path, rows, f"{extension_format}:pairs", labels={"good": 5})
    with pytest.raises(ConfigError, match=r"data\.\*\.labels: the format .*:pairs does not say which column holds"):
        load_examples(words)


def test_an_attribute_that_reads_nothing_is_named(tmp_path: Path, extension_format: str) -> None:
    with pytest.raises(ConfigError, match="data.*format: '.*:NUMBER' is a int, not a reader of records"):
        load_examples(source(tmp_path, [], f"{extension_format}:NUMBER"))


def test_a_bug_of_a_reader_keeps_its_traceback(tmp_path: Path, extension_format: str) -> None:
    with pytest.raises(KeyError, match="grades"):
        load_examples(source(tmp_path, [{"question": "a"}], f"{extension_format}:pairs"))


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


SICK = [
    {"pair_ID": "1", "sentence_A": "A man, alone", "sentence_B": "A {b}", "relatedness_score": " 4.5"},
    {"pair_ID": "2", "sentence_A": "2024-01-01", "sentence_B": "c", "relatedness_score": "1"},
]


@pytest.mark.parametrize("name", ["sick.csv", "sick.tsv", "sick.jsonl"])
def test_columns_of_any_file_and_a_template_of_its_own(tmp_path: Path, name: str) -> None:
    template = tmp_path / "t.txt"
    template.write_text("1: {sentence_A}\n2: {other}\nScore?")
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in SICK))
    if path.suffix != ".jsonl":
        table(path, SICK)
    columns = {"label": "relatedness_score", "id": "pair_ID", "group": "sentence_A", "other": "sentence_B"}
    found = load_examples(DataSource(path=str(path), columns=columns), str(template), [1, 5])
    assert [(e.id, e.label, e.meta["group"]) for e in found] == [("1", 4.5, "A man, alone"), ("2", 1.0, "2024-01-01")]
    assert found[0].messages == [{"role": "user", "content": "1: A man, alone\n2: A {b}\nScore?"}]


def test_columns_go_before_any_format(tmp_path: Path) -> None:
    rows = [{"text": "p", "human": [4, 5], "gpt4_score": [1]}, {"text": "q", "gpt4_score": [2]}]
    data = source(tmp_path, rows, "mt_bench", columns={"instruction": "text", "gpt4_score": "human"})
    (example,) = load_examples(data)  # the second record has no annotation in that column
    assert (example.messages[0]["content"], example.label) == ("p", 4.5)


def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", SICK)
    with pytest.raises(
        DataError,
        match=r"a\.csv: .*takes 'label' from the column 'score', which no record has; the "
        "columns are pair_ID, sentence_A, sentence_B, relatedness_score$",
    ):
        load_examples(DataSource(path=str(path), columns={"prompt": "sentence_A", "label": "score"}))


def test_labels_that_are_words(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "label": "entailment "}, {"prompt": "b", "label": ["neutral", 0, None]}]
    labels = {"entailment": 5, "neutral": 3, 0: 1}
    data = source(tmp_path, rows, labels=labels)
    assert [e.label for e in load_examples(data)] == [5.0, 2.0]
    path = table(tmp_path / "a.csv", [{"prompt": "a", "judged": "neutral"}, {"prompt": "b", "judged": "5"}])
    with pytest.raises(
        DataError,
        match=r"a\.csv, line 3: the label '5' has no number in data\.\*\.labels \(it has "
        r"entailment, neutral, 0\)",
    ):
        load_examples(DataSource(path=str(path), columns={"label": "judged"}, labels=labels))


@pytest.mark.parametrize(
    ("format", "column"),
    [
        ("jsonl", "label"),
        ("feedback_collection", "orig_score"),
        ("feedback_bench", "orig_score"),
        ("flask", "gpt4_score"),
        ("vicuna_bench", "gpt4_score"),
        ("mt_bench", "gpt4_score"),
    ],
)
def test_labels_that_are_words_stand_in_the_column_of_the_format(tmp_path: Path, format: str, column: str) -> None:
    """Its own, one under its name, or the one that is chosen; a column named `label` means nothing elsewhere."""
    rows: list[dict[str, Any]] = [
        {"prompt": "p", "instruction": "p", "label": 0, "orig_score": 0, "gpt4_score": 0, "cls": "good"},
        {"prompt": "q", "instruction": "q", "label": 0, "orig_score": 0, "gpt4_score": 0, "cls": ["bad", "good"]},
    ]
    labels = {"good": 5, "bad": 2}

    def read(rows: list[dict[str, Any]], **fields: Any) -> list[float]:
        return [e.label for e in load_examples(source(tmp_path, rows, format, labels=labels, **fields))]

    assert read([row | {column: row["cls"]} for row in rows]) == [5.0, 3.5]
    assert read(rows, columns={column: "cls"}) == [5.0, 3.5]
    assert read(rows, score="cls") == [5.0, 3.5]
    with pytest.raises(
        DataError, match=r"line 1: the label '0' has no number in data\.\*\.labels \(it has good, bad\)"
    ):
        read(rows)


def test_labels_that_are_true_or_class_numbers(tmp_path: Path) -> None:
    """Numbers as text or not, and what JSON writes as true."""
    rows = [{"prompt": "a", "label": label} for label in (1, "1", True, "no ", 2.5)]
    (tmp_path / "run.yaml").write_text(
        f"data:\n  train:\n  - path: {source(tmp_path, rows).path}\n    labels: {{1: 5, 2.5: 4, 'true': 3, 'no': 2}}\n"
    )
    data = RunConfig.from_yaml(tmp_path / "run.yaml").data.train[0]
    assert [e.label for e in load_examples(data)] == [5.0, 5.0, 3.0, 2.0, 4.0]


def test_columns_that_are_kept(tmp_path: Path) -> None:
    """`group` always, where a record has it, and those that an evaluation asks for, also fields that a format makes."""
    rows = [{"instruction": "###The instruction to evaluate:\nQ\n###Feedback:", "gpt4_score": 3, "group": 7, "x": "y"}]
    data = source(tmp_path, rows, "mt_bench")
    assert load_examples(data)[0].meta == {"gpt4_score": 3, "group": 7}
    (example,) = load_examples(data, keep=["x", "orig_instruction"])
    assert example.meta == {"gpt4_score": 3, "group": 7, "x": "y", "orig_instruction": "Q\n"}
    with pytest.raises(DataError, match=r"line 1: no value in the column 'z', .*; the columns are instruction, gpt4_"):
        load_examples(data, keep=["z"])


def test_ids_of_a_file_without_a_unicode_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # pytest's own workers cannot report a log with such a name
    path = tmp_path / os.fsdecode(b"a\xff.jsonl")
    path.write_text('{"prompt": "a", "label": 1}')
    assert [e.id for e in load_examples(DataSource(path=str(path)))] == ["a\\udcff-1"]


@pytest.mark.skipif(not SICK_FILE.exists(), reason="needs ../shared/data/relatedness")
def test_a_real_data_set_by_its_own_columns(tmp_path: Path) -> None:
    """SICK as JSON lines, the same as CSV with other names: equal examples, to the last bit of each label."""
    own = [json.loads(line) for line in SICK_FILE.read_text(encoding="utf-8").splitlines()]
    names = {"prompt": "pair", "label": "relatedness_score", "cot": "entailment", "id": "pair_ID", "group": "group"}
    path = table(tmp_path / "sick.csv", [{theirs: row.get(ours) for ours, theirs in names.items()} for row in own])
    found = load_examples(DataSource(path=str(path), columns=names), values=[1, 5])
    expected = load_examples(DataSource(path=str(SICK_FILE)), values=[1, 5])
    assert len(found) == len(own) > 500
    for a, b in zip(found, expected, strict=True):
        assert (a.id, a.messages, a.label, a.cot, a.meta["group"]) == (
            b.id,
            b.messages,
            b.label,
            b.cot,
            b.meta["group"],
        )


@pytest.mark.parametrize(
    ("format", "row", "column"),
    [
        ("jsonl", {"prompt": "p", "label": 1}, "cot"),
        ("feedback_collection", {"instruction": "p", "orig_score": 1}, "orig_feedback"),
        ("flask", {"instruction": "p", "gpt4_score": 1}, "gpt4_feedback"),
    ],
)
def test_a_critique_that_is_no_text_is_an_error_where_it_is_needed(
    tmp_path: Path, format: str, row: dict[str, Any], column: str
) -> None:
    good = load_examples(source(tmp_path, [row | {column: " Good."}], format))[0].cot
    assert good is not None and good.strip() == "Good."
    for critique, shown in ((["a", 2], r"(2|\['a', 2\])"), (5, "5"), ({"a": 1}, r"\{'a': 1\}")):
        data = source(tmp_path, [row | {column: critique}], format)
        with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: the critique is {shown}; it must be a text"):
            load_examples(data)
        assert [(e.label, e.cot) for e in load_examples(data, critiques=False)] == [(1.0, None)]


def test_unknown_format(tmp_path: Path) -> None:
    message = r"data\.\*\.format: unknown record format 'csv'; known: feedback_bench, .*, or module:name"
    with pytest.raises(ConfigError, match=message):
        load_examples(source(tmp_path, [], "csv"))


def test_one_record_alone() -> None:
    with pytest.raises(DataError, match="^prompt 1: 'prompt' holds the lone surrogate"):
        example_from_record({"prompt": "\ud800"}, "plain", "prompt 1", "1")
    example = example_from_record({"prompt": "a", "label": "?", "cot": 5}, "plain", "in.jsonl, line 4", "4")
    assert (example.id, example.has_label) == ("4", False)
    with pytest.raises(DataError, match=r"^in\.jsonl, line 4: template 'plain' needs 'prompt'"):
        example_from_record({}, "plain", "in.jsonl, line 4", "4")


@pytest.mark.skipif(not VICUNA.exists(), reason="needs ../shared/data/vicuna_eval.json")
def test_the_real_vicuna_bench() -> None:
    data = DataSource(format="vicuna_bench", path=str(VICUNA))
    examples = load_examples(data, values=[1, 5])
    raw = json.loads(VICUNA.read_text())
    assert len(examples) == 320
    assert [e.label for e in examples] == [sum(row["gpt4_score"]) / 3 for row in raw]
    assert sum(e.label for e in examples) / 320 == pytest.approx(4.1458333, abs=1e-7)
    assert all(e.cot in row["gpt4_feedback"] for e, row in zip(examples, raw, strict=True))
    # The built-in template writes the published prompt from its parts, character for character.
    assert [e.messages for e in load_examples(data, "prometheus")] == [e.messages for e in examples]
    assert all(e.messages[0]["content"] == row["instruction"].strip() for e, row in zip(examples, raw, strict=True))


@pytest.mark.parametrize("format", ["jsonl", "feedback_collection"])
def test_critiques_end_before_their_score_statement(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    cots = ["Good. So the overall score is 4.", "Fine.", "[RESULT] 4", "Long. Aside: a score of 5."]
    key, label = ("orig_feedback", "orig_score") if format == "feedback_collection" else ("cot", "label")
    rows = [{"prompt": "a", "instruction": "a", label: 4, key: cot} for cot in cots]
    caplog.set_level("INFO")

    def read(**fields: Any) -> list[str | None]:
        return [example.cot for example in load_examples(source(tmp_path, rows, format, **fields))]

    assert read() == ["Good.", "Fine.", "", "Long. Aside: a score of 5."]
    assert "cut the end of 2 of 4 critiques, which said the score; 1 had nothing else" in caplog.text
    assert read(score_statement="keep") == cots
    assert read(critique_end=r"Aside:") == ["Good.", "Fine.", "", "Long."]
    assert read(critique_end=r"Aside:", score_statement="keep") == [*cots[:3], "Long."]


@pytest.mark.skipif(not VICUNA.exists(), reason=f"{VICUNA} is absent")
def test_published_critiques_stay_and_statements_behind_them_go() -> None:
    """GPT-4's 960 critiques of Vicuna Bench end without a statement; Feedback Collection's is put behind each."""
    rows = json.loads(VICUNA.read_text())
    critiques = [text.strip() for row in rows for text in row["gpt4_feedback"]]
    assert [without_end(text) for text in critiques] == critiques
    for text in critiques:
        ended = without_end(f"{text} So the overall score is 3.")
        assert text.startswith(ended)
        assert set(text[len(ended) :]) <= set(":")  # some end "Feedback:"

import csv
import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from real_megatron.config import DataSource
from real_megatron.data.files import read_records, source_digest
from real_megatron.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": "2024-01-01", "label": 1, "id": "2024-05-05 10:00:00"},
    {"prompt": "line\u2028separator", "label": "2"},
    {"prompt": "c", "other": {"a": [1]}},
]


def read(path: Path, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    return list(read_records(DataSource(path=str(path), **fields)))


def test_json_records_come_as_they_are_written(tmp_path: Path) -> None:
    lines, listed, byte_order = tmp_path / "a.jsonl", tmp_path / "a.json", tmp_path / "b.json"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    lines.write_text(text, encoding="utf-8")
    listed.write_text("\n " + json.dumps(ROWS, indent=1))
    byte_order.write_text(text, encoding="utf-8-sig")  # .json may hold lines; some editors put a byte order mark
    assert read(lines) == [(f"{lines}, line {n}", row) for n, row in zip((1, 3, 5), ROWS, strict=True)]
    assert read(listed) == [(f"{listed}, row {n}", row) for n, row in zip((1, 2, 3), ROWS, strict=True)]
    assert [row for _, row in read(byte_order)] == ROWS


def test_parquet_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"prompt": str(i), "gpt4_score": [i, 5]} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(path) == [(f"{path}, row {i + 1}", row) for i, row in enumerate(rows)]
    assert [row for _, row in read(path, limit=3)] == rows[:3]


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\nbroken')
    assert read(path, limit=1) == [(f"{path}, line 1", {"prompt": "a"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', r"a\.jsonl, line 3: not valid JSON \(Expecting value, column 7\)"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl, line 2: \[1\] is no object"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}', r"a\.jsonl, line 1: 'c' is there twice in one object"),
        ("a.json", b'[{"a": 1},\n {"a": 2}', r"a\.json, line 2, column 10: not valid JSON .* is the file complete"),
        ("a.json", b'[{"a": 1}, null]', r"a\.json, row 2: null is no object"),
        ("a.jsonl", b'{}\n{"a": "\xff"}', r"a\.jsonl, line 2: not UTF-8 text \(column 8\)"),
        ("a.json", b'[{},\n{"a": "\xff"}]', r"a\.json, line 2: not UTF-8 text \(column 8\)"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"a\.json, line 1, column 11: not valid JSON \(Expecting ',' delimiter\)"),
        ("a.json", b'[{"a": 1}] 2', r"a\.json, line 1, column 12: not valid JSON \(Extra data\)"),
        ("a.json", b'[{"a": 1},]', r"a\.json, line 1, column 11: not valid JSON \(Expecting value\)"),
        ("a.parquet", b"no", r"a\.parquet: not readable as Parquet"),
        ("a.xls", b"a,b", r"a\.xls: unknown kind of file; use \.json, \.jsonl, \.parquet, \.csv, \.tsv"),
        ("a.csv", b"a,b\n1,2\n\n3\n", r"a\.csv, line 4: 1 cells for 2 columns \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", r"a\.csv, line 1: the column 'a' is named twice"),
        ("a.csv", b'a,b\n"1\n1",2\n"3,4\n5,6\n', r"a\.csv, line 4: unexpected end of data; put a cell"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv, line 2: not UTF-8 text"),
        ("a.csv", b"\n", r"a\.csv, line 1: no names of columns"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


DEEP, LONG = "[" * 100_000, "1" * 5000
HOSTILE = [
    (r'{"a": "x\ud800"}', r"'a' holds the lone surrogate '\\ud800'"),
    (r'{"a": [{"\ude00": 1}]}', r"'a' holds the lone surrogate '\\ude00'"),
    (r'{"\ud800": 1}', r"holds the lone surrogate"),
    ('{"a": ' + DEEP + "}", "nested too deeply"),
    ('{"a": ' + "[" * 150 + "]" * 150 + "}", "'a' is nested too deeply, beyond 100 levels"),
    ('{"a": ' + LONG + "}", "a whole number has more than 4300 digits"),
]


@pytest.mark.parametrize(("record", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_could_not_be_written_again_is_named(tmp_path: Path, record: str, message: str) -> None:
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": 1}\n' + record)
    listed.write_text('[{"a": 1},\n' + record + "]")
    for path, where in ((lines, "line 2"), (listed, "row 2")):
        with pytest.raises(DataError, match=rf"^\S*{path.name}, {where}: .*{message}"):
            read(path)
    assert len(read(lines, limit=1)) == 1


def test_csv_values_are_texts(tmp_path: Path) -> None:
    """Also what looks like a date or a number; an empty cell is null, which CSV has no other sign for."""
    rows = [{"day": "2024-01-01", "n": "007", "text": 'a "b",\nc\td', "none": None}, {"day": "x", "n": " 4"}]
    path, tabs = tmp_path / "a.csv", tmp_path / "A.TSV"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert read(path) == [
        (f"{path}, line 2", rows[0]),
        (f"{path}, line 4", {"day": "x", "n": " 4", "text": None, "none": None}),
    ]
    long = "x" * 200_000  # beyond the csv module's own limit
    tabs.write_text(f'day\ttext\n1\t"Stop!" he said\n\n2\t{long}\n')
    assert read(tabs) == [
        (f"{tabs}, line 2", {"day": "1", "text": '"Stop!" he said'}),
        (f"{tabs}, line 4", {"day": "2", "text": long}),
    ]


def test_parquet_values_are_json(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    row = {"at": datetime(2024, 1, 2, 3, 4), "n": Decimal("4.50"), "parts": [{"day": date(2024, 1, 2)}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert read(path) == [
        (f"{path}, row 1", {"at": "2024-01-02 03:04:00", "n": "4.50", "parts": [{"day": "2024-01-02"}]})
    ]


def test_cells_of_a_tsv_that_look_quoted_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [["id", "text"], ["1", 'say "hi"'], ["2", "plain"], ["3", 'a "b" "c"'], ["4", '"x']]

    def written(quoting: int, **fields: Any) -> tuple[list[dict[str, Any]], list[str]]:
        caplog.clear()
        path = tmp_path / "a.tsv"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=quoting, quotechar=fields.pop("quotechar", '"')).writerows(rows)
        found = [row for _, row in read(path, **fields)]
        return found, [record.getMessage().removeprefix(str(path)) for record in caplog.records]

    found, warnings = written(csv.QUOTE_MINIMAL)  # as pandas does
    assert [row["text"] for row in found] == ['"say ""hi"""', "plain", '"a ""b"" ""c"""', '"""x"']
    (warning,) = warnings
    assert warning.startswith(", line 2: the first of 3 cells that look quoted; in a .tsv quotes are part of the text")
    _, (warning,) = written(csv.QUOTE_MINIMAL, limit=1)
    assert warning.startswith(", line 2: the first of 1 cells")
    _, (warning,) = written(csv.QUOTE_ALL)
    assert warning.startswith(", line 2: the first of 10 cells")  # with the names of the two columns
    found, warnings = written(csv.QUOTE_NONE, quotechar=None)
    assert [row["text"] for row in found] == [text for _, text in rows[1:]] and not warnings
    rows[2][1] = "two\nlines"
    with pytest.raises(DataError, match=r"line 3: 2 cells|line 4: 1 cells for 2 columns .* not at all in a \.tsv"):
        written(csv.QUOTE_MINIMAL)
    assert "the first of 1 cells that look quoted" in caplog.text


class Picture:
    """What a hub data set may hold."""


@pytest.mark.parametrize("hub", [False, True])
def test_columns_that_json_cannot_hold_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hub: bool
) -> None:
    rows = [
        {"prompt": str(i), "picture": {"bytes": b"\x89PNG"} if i else None, "parts": [b""] * i, "label": i}
        for i in range(3)
    ]
    path, kind = tmp_path / "a.parquet", "bytes"
    if hub:
        path, kind = Path("owner/name"), "Picture"
        rows = [row | {"picture": Picture() if row["picture"] else None} for row in rows]
        monkeypatch.setattr("real_megatron.data.files.datasets.load_dataset", lambda *_, **__: rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = [row for _, row in read(path)]
    assert found[1:] == [{"prompt": "1", "label": 1}, {"prompt": "2", "label": 2}]
    json.dumps(found)
    warnings = [record.getMessage() for record in caplog.records]
    assert sorted(warnings) == [
        f"{path}: left out the column {name!r} of 2 records: it holds {what}, which JSON cannot; to use it, store it "
        "as text"
        for name, what in (("parts", "bytes"), ("picture", kind))
    ]
    # What a run's data are does not depend on where an object lies in memory, and is said once.
    digest = source_digest(DataSource(path=str(path)))
    if hub:
        rows[1]["picture"] = Picture()
    assert source_digest(DataSource(path=str(path))) == digest and len(caplog.records) == 2


def test_numbers_of_numpy_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"n": np.int64(3), "x": np.float32(0.5), "y": np.float64(2), "flag": np.True_, "rows": np.eye(2, dtype=int)}
    times = {"at": np.datetime64("2024-01-02T03:04", "ns"), "days": np.array(["2024-01-02"], "M8[ns]")}
    monkeypatch.setattr("real_megatron.data.files.datasets.load_dataset", lambda *_, **__: [row | times])
    ((_, found),) = read(Path("owner/name"))
    assert json.loads(json.dumps(found)) == {
        **{"n": 3, "x": 0.5, "y": 2.0, "flag": True, "rows": [[1, 0], [0, 1]]},
        **{"at": "2024-01-02T03:04:00.000000000", "days": ["2024-01-02T00:00:00.000000000"]},
    }


def test_faults_within_parquet_name_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"a\xff")
    )
    pyarrow.parquet.write_table(pyarrow.table({"a": bad}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: not UTF-8 text"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: a column is named twice: a, a"):
        read(path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("name", ["run[1]", "run?", "run*", "run{1,2}", "owner/run::zip:", "**"])
def test_a_path_is_no_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    """The file in `run1` fits each pattern, comes first and must not be read; nor is a missing one replaced by it."""
    monkeypatch.chdir(tmp_path)
    for folder in ("run1", name):
        path = Path(folder) / f"d.{suffix}"
        path.parent.mkdir(parents=True)
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"a": [folder]}), path)
        else:
            path.write_text(json.dumps({"a": folder}) if suffix == "jsonl" else f'a\n"{folder}"\n')
    assert [record for _, record in read(path)] == [{"a": name}]
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        read(path)


@pytest.mark.parametrize("name", ["owner/name", "run[1]"])
def test_a_directory_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("run1", name):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "train.jsonl").write_text('{"a": 1}')
    with pytest.raises(DataError, match="a directory; name the file in it"):
        read(Path(name))


@pytest.mark.parametrize("name", ["run[1]", "a/b/c", "hf://x", "../x", "data/*", ""])
def test_what_is_no_name_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no name of a data set on the hub|a directory"):
        list(read_records(DataSource(path=name)))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        read(tmp_path / "gone.jsonl")


def test_hub_data_sets_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub cannot be reached in tests: its answers, a data set and a refusal, are put in its place."""
    asked = []

    def load_dataset(path: str, split: str) -> Any:
        asked.append((path, split))
        if split == "test":
            raise ValueError('Unknown split "test". Should be one of ["train"].')
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setattr("real_megatron.data.files.datasets.load_dataset", load_dataset)
    assert read(Path("owner/name"), limit=1) == [("owner/name, row 1", {"prompt": "a"})]
    with pytest.raises(DataError, match=r'owner/name: not a local file, .* split \'test\': .*one of \["train"\]'):
        read(Path("owner/name"), split="test")
    assert asked == [("owner/name", "train"), ("owner/name", "test")]


def test_a_subset_and_records_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, subset: str, split: str) -> Any:
        return [{"a": subset + split, "at": date(2024, 1, 2)}, {"a": "\ud800"}]

    monkeypatch.setattr("real_megatron.data.files.datasets.load_dataset", load_dataset)
    assert read(Path("glue"), subset="stsb", limit=1) == [("glue, row 1", {"a": "stsbtrain", "at": "2024-01-02"})]
    with pytest.raises(DataError, match="^glue, row 2: 'a' holds the lone surrogate"):
        read(Path("glue"), subset="stsb")

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from real_megatron.config import DataSource
from real_megatron.data.files import read_records
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
        ("a.json", b'[{"a": 1},\n {"a": 2}', r"a\.json, line 2, column 10: not valid JSON .* is the file complete"),
        ("a.json", b'[{"a": 1}, null]', r"a\.json, row 2: null is no object"),
        ("a.jsonl", b'{"a": "\xff"}', r"a\.jsonl: not UTF-8 text"),
        ("a.parquet", b"no", r"a\.parquet: not readable as Parquet"),
        ("a.csv", b"a,b", r"a\.csv: unknown kind of file; use \.json, \.jsonl, \.parquet"),
    ],
)
def test_faults_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


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

"""Records of a data set, one by one, each with its place (file and line or row)."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from real_megatron.config import DataSource
from real_megatron.errors import DataError

JSON, PARQUET = (".json", ".jsonl"), ".parquet"


def read_records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first `source.limit` records, each after its place: file and line (JSON lines) or row, counted from 1.

    Sources: a local .json (a list of objects, or one object a line), .jsonl or .parquet file, or the name of a data
    set on the hub. Parquet and hub data go through `datasets`. Local JSON does not: Arrow's reader turns texts that
    look like dates into timestamps, merges types, and does not say which line is broken.

    Raises DataError, naming the place and the fix, for what cannot be read.
    """
    path = Path(source.path)
    if path.suffix in (*JSON, PARQUET):
        if not path.is_file():
            raise DataError(f"{path}: no such file; correct the path of this data set")
        records = _json(path) if path.suffix in JSON else _numbered(path, _parquet(path))
    elif path.is_file():
        raise DataError(f"{path}: unknown kind of file; use {', '.join((*JSON, PARQUET))}")
    else:
        records = _numbered(path, _hub(source))
    return islice(records, source.limit)


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            first = next((char for line in file for char in line if not char.isspace()), None)
            file.seek(0)
            records = _numbered(path, _list(path, file.read())) if first == "[" else _lines(path, file)
            for where, record in records:
                if not isinstance(record, dict):
                    raise DataError(f"{where}: {json.dumps(record)[:80]} is no object; each record is one JSON object")
                yield where, record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None


def _lines(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg}, column {error.colno}); write one object a line, or one list"
            ) from None
        except ValueError as error:  # an integer of more digits than Python reads
            raise DataError(f"{where}: {error}") from None
        yield where, record


def _list(path: Path, text: str) -> list[Any]:
    try:
        records: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); is the file complete?"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return records


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        # Streaming: the file is read in place, nothing is copied to a cache.
        yield from datasets.load_dataset("parquet", data_files=str(path.absolute()), split="train", streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}; write the file again") from error


def _hub(source: DataSource) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.path, split=source.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.path}: not a local file, and cannot be loaded from the hub with split {source.split!r}: "
            f"{error}; correct path or split, or download it and give the file"
        ) from error


def _numbered(path: Path, records: Any) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, 1))

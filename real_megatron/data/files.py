"""Records of a data set, through `datasets`; what cannot be read is reported with its row."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from real_megatron.config import DataSource

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def read_records(source: DataSource) -> Iterator[dict[str, Any]]:
    """The first `source.limit` records of a local file (.json, .jsonl, .parquet) or of a data set on the hub.

    A local file is streamed: nothing is copied to a cache. Columns that a record lacks may come as None. Raises
    ValueError, naming the file and row, for what cannot be read.
    """
    path = Path(source.path)
    if path.suffix in BUILDERS:
        if not path.is_file():
            raise ValueError(f"{source.path}: no such file; correct the path of this data set")
        records = _local(path)
    elif path.is_file():
        raise ValueError(f"{source.path}: unknown kind of file; use {', '.join(sorted(BUILDERS))}")
    else:
        records = iter(_hub(source))
    return islice(records, source.limit)


def _local(path: Path) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        yield from datasets.load_dataset(
            BUILDERS[path.suffix], data_files=str(path.absolute()), split="train", streaming=True
        )
    except Exception as error:  # Arrow's and datasets' own, which name no row
        fault = _json_fault(path) if BUILDERS[path.suffix] == "json" else None
        if fault is None and not isinstance(error, (ValueError, TypeError, datasets.exceptions.DatasetsError)):
            raise
        raise ValueError(fault or f"{path}: cannot be read: {error}") from error


def _hub(source: DataSource) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source.path, split=source.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{source.path}: not a local file, and cannot be loaded from the hub with split {source.split!r}: "
            f"{error}; correct path or split, or download it and give the file"
        ) from error


def _json_fault(path: Path) -> str | None:
    """What is wrong with a JSON file, at the first row where it shows; None if nothing is found."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8"
    if text.lstrip().startswith("["):
        try:
            rows = [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except json.JSONDecodeError as error:
            return f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); correct it"
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    return f"{path}, line {number}: not valid JSON ({error.msg}); each line is one JSON object"
    seen: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            return f"{path}, {where}: {_kind(row)} instead of an object; each record is one JSON object"
        for column, value in row.items():
            kind = _kind(value)
            first_kind, first_where = seen.setdefault(column, (kind, where)) if value is not None else (kind, where)
            if kind != first_kind:
                return f"{path}, {where}: {column!r} is {kind} but {first_kind} in {first_where}; use one type"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")

"""Records of a data set, one by one, each with its place (file and line or row)."""

import csv
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet

from real_megatron.config import DataSource
from real_megatron.data.record import check_text, decode_json, naming, parse_json, plain_record
from real_megatron.errors import DataError

logger = logging.getLogger(__name__)

Rows = Generator[tuple[str, Any], None, None]

HUB_NAME = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*", re.ASCII)
QUOTED = re.compile(r'"(?:[^"]|"")*"')
"""A cell as RFC 4180 quotes it."""
CELL = 2**31 - 1
"""Longest cell of a CSV file, in characters. Python's own limit, 131,072, is less than a long prompt has."""


def read_records(source: DataSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first `source.limit` records, each after its place: file and line (JSON lines, CSV) or row, counted from 1.

    Sources: a local file, opened as exactly this file whatever characters its path has, or the name of a data set on
    the hub. Kinds of files, by the end of the name:

    - .jsonl: an object a line; .json: the same, or one list of objects
    - .csv: commas, and quotes as in RFC 4180; .tsv: tabs, quotes have no meaning (what looks quoted is counted and
      logged). The first line names the columns. Values stay texts; an empty cell is null
    - .parquet

    Columns that JSON cannot hold (bytes, pictures) are left out, counted and logged.

    Hub data goes through `datasets`. Local files do not: `datasets` takes paths for patterns, and its readers of text
    turn what looks like a date into a timestamp, merge types, and do not say which line is broken.

    Raises DataError, naming the place and the fix, for what cannot be read or not be written again (`plain_record`).
    """
    lost: Counter[tuple[str, str]] = Counter()
    yield from _records(source, lost)
    for (column, kind), count in lost.items():
        logger.warning(
            "%s: left out the column %r of %d records: it holds %s, which JSON cannot; to use it, store it as text",
            source.path,
            column,
            count,
            kind,
        )


def _records(source: DataSource, lost: Counter[tuple[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_records`; the columns left out, each with its type, are counted in `lost`."""
    path = Path(source.path)
    read = _READERS.get(path.suffix.lower())
    if path.is_dir():  # also where it has the name of a data set on the hub: datasets would read whatever lies in it
        raise DataError(f"{path}: a directory; name the file in it")
    if read is None and path.exists():
        raise DataError(f"{path}: unknown kind of file; use {', '.join(_READERS)}; a compressed one is to be unpacked")
    if read is not None and not path.is_file():
        more = " (patterns are not expanded: name each file)" if re.search(r"[*?\[]", source.path) else ""
        more = more or (" (URLs are not read: download it)" if "://" in source.path else "")
        raise DataError(f"{source.path}: no such file{more}; correct the path of this data set")
    if read is not None and read is not _parquet:
        _refuse_other_kind(path)
    with closing(_hub(source) if read is None else read(path)) as rows:
        for where, record in islice(rows, source.limit):
            found: dict[str, str] = {}
            with naming(where):
                plain = plain_record(record, found)
            lost.update(found.items())
            yield where, plain


_SIGNATURES = {
    b"\x1f\x8b": "a gzip file: unpack it (gunzip)",
    b"PK\x03\x04": "a zip file, or a table of Excel: unpack it, or save the table as .csv",
    b"BZh": "a bzip2 file: unpack it (bunzip2)",
    b"\xfd7zXZ\0": "an xz file: unpack it (unxz)",
    b"\x28\xb5\x2f\xfd": "a Zstandard file: unpack it (unzstd)",
    b"PAR1": "a Parquet file: name it .parquet",
    b"\xff\xfe": "UTF-16 text: save the file as UTF-8",
    b"\xfe\xff": "UTF-16 text: save the file as UTF-8",
    b"version https://git-lfs": "a Git LFS pointer in place of the file: fetch it (git lfs pull)",
}


def _refuse_other_kind(path: Path) -> None:
    """Raise DataError for a file whose first bytes are those of another kind than its name says."""
    with path.open("rb") as file:
        begin = file.read(32)
    for signature, what in _SIGNATURES.items():
        if begin.startswith(signature):
            raise DataError(f"{path}: {what}")


def source_digest(source: DataSource) -> str:
    """A digest of what a data set holds: of a local file's bytes, of a hub data set's first `limit` records.

    Equal for the same content under another path. Raises DataError as `read_records` does.
    """
    path, digest = Path(source.path), hashlib.blake2b(digest_size=16)
    if path.is_file():
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    else:
        for _, record in _records(source, Counter()):
            digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def _open(path: Path) -> TextIO:
    # Bytes that are not UTF-8 are found where they are used, since only there the line is known.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json(path: Path) -> Rows:
    with _open(path) as file:
        first = next((char for line in file for char in line if not char.isspace()), None)
        file.seek(0)
        yield from _list(path, file.read()) if first == "[" else _lines(path, file)


def _lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        with naming(where):
            record = parse_json(line)
        yield where, record


def _list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, parsed one by one, so that a faulty one is known by its number."""
    for number, line in enumerate(text.split("\n"), 1):
        with naming(f"{path}, line {number}"):
            check_text(line)
    number, at = 0, _skip(text, text.index("[") + 1)
    try:
        while text[at : at + 1] != "]":
            if number:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at = _skip(text, at + 1)
            number += 1
            where = f"{path}, row {number}"
            with naming(where):
                record, at = decode_json(text, at)
            yield where, record
            at = _skip(text, at)
        if (end := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}); is the file complete?"
        ) from None


def _skip(text: str, at: int) -> int:
    """The position of what follows the white space at `at`."""
    while text[at : at + 1] in tuple(" \t\n\r"):
        at += 1
    return at


def _csv(path: Path, dialect: Mapping[str, Any]) -> Rows:
    csv.field_size_limit(CELL)
    with _open(path) as file:
        rows = csv.reader(file, strict=True, **dialect)
        names: list[str] = []
        while True:
            # A quoted cell may hold line breaks: a row is known by its first line.
            where = f"{path}, line {rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                raise DataError(
                    f"{where}: {error}; put a cell that holds quotes, commas or line breaks between quotes, and write "
                    "quotes in it twice"
                ) from None
            if row is None:
                break
            with naming(where):
                check_text("\n".join(row))
            if not names:
                names = row
                repeated = [name for i, name in enumerate(names) if name in names[:i]]
                if repeated or not names:
                    what = f"the column {repeated[0]!r} is named twice" if repeated else "no names of columns"
                    raise DataError(f"{where}: {what}; the first line names each column")
            elif len(row) == len(names):
                yield where, {name: cell or None for name, cell in zip(names, row, strict=True)}
            elif row:  # a blank line is none
                raise DataError(
                    f"{where}: {len(row)} cells for {len(names)} columns ({', '.join(names)}); is the separator right? "
                    "A cell may hold it, or a line break, between quotes in a .csv, and not at all in a .tsv"
                )


def _tsv(path: Path) -> Rows:
    count, first = 0, ""
    try:
        for where, record in _csv(path, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}):
            cells = [*record.values(), *([] if count else record)]  # names of columns may be quoted too
            found = sum(1 for cell in cells if cell and QUOTED.fullmatch(cell))
            count, first = count + found, first or (where if found else "")
            yield where, record
    finally:  # also where a limit ends the reading, or what is wrong because of the quotes
        if count:
            logger.warning(
                "%s: the first of %d cells that look quoted; in a .tsv quotes are part of the text: if that is not "
                "meant, save the table as .csv, or without quotes (pandas: quoting=csv.QUOTE_NONE)",
                first,
                count,
            )


def _parquet(path: Path) -> Rows:
    number = 0
    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: a column is named twice: {', '.join(names)}; give each its own name")
            for batch in table.iter_batches(1024):
                for row in range(batch.num_rows):
                    number += 1
                    (record,) = batch.slice(row, 1).to_pylist()
                    yield f"{path}, row {number}", record
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, row {number}: not UTF-8 text ({error.reason}); write the file again") from None
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}; write the file again") from error


def _hub(source: DataSource) -> Rows:
    if not HUB_NAME.fullmatch(source.path):
        raise DataError(f"{source.path}: no such file, and no name of a data set on the hub (owner/name); correct it")
    try:
        records = datasets.load_dataset(source.path, *filter(None, [source.subset]), split=source.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source.path}: not a local file, and cannot be loaded from the hub with split {source.split!r}: "
            f"{error}; correct path, split or subset, or download it and give the file"
        ) from error
    for number, record in enumerate(records, 1):
        yield f"{source.path}, row {number}", record


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json,
    ".parquet": _parquet,
    ".csv": partial(_csv, dialect={"delimiter": ","}),
    ".tsv": _tsv,
}

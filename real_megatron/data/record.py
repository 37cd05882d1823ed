"""A record in plain JSON types, as readers of formats get it, whatever file it is from."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from real_megatron.errors import DataError

DEPTH = 100
"""Deepest nesting of a record: far from Python's recursion limit, which depends on who calls."""
DIGIT_BITS = 14_000
"""Longest whole number, in bits: Python refuses to write more than 4300 digits."""


class _NotJson(Exception):
    """A value that JSON cannot hold; its argument is the name of its type."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put the place of a record before the message of a DataError that does not say it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def parse_json(text: str) -> Any:
    """A JSON value. Raises DataError, which does not say where, for text that is not Unicode or not JSON.

    Bytes that are not UTF-8 are expected as the surrogates that `errors="surrogateescape"` makes of them.
    """
    check_text(text)
    try:
        value, end = decode_json(text, 0)
        if text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error.msg}, column {error.colno}); write one object a line") from None
    return value


def decode_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start`, or behind white space there, and where it ends.

    Raises JSONDecodeError for what is no JSON, DataError for JSON that Python cannot hold.
    """
    while text[start : start + 1].isspace():
        start += 1
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise DataError("nested too deeply; flatten it") from None
    except ValueError:  # more digits than Python reads
        raise DataError("a whole number has more than 4300 digits; correct it, or write it as a text") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of these keys and values. Raises DataError for a key that is there twice: which one is meant?"""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{repeated!r} is there twice in one object; keep one")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def check_text(text: str) -> None:
    """Raise DataError for text of a file, read with `errors="surrogateescape"`, that is not UTF-8 or holds NUL bytes,
    as a file does that a crash has cut off."""
    if "\0" in text:
        raise DataError(f"NUL bytes (column {text.index(chr(0)) + 1}): the file is damaged; write it again, as UTF-8")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"not UTF-8 text (column {error.start + 1}); save the file as UTF-8") from None


def plain_record(value: Any, lost: dict[str, str] | None = None) -> dict[str, Any]:
    """A record in JSON types: dates, times and decimal numbers as texts, tuples and arrays as lists.

    A column that JSON cannot hold, such as one of bytes or pictures, is left out, and put into `lost` with the name of
    the type.

    Raises DataError, which does not say where, for what is no record, and for what could be read but not written: lone
    surrogates, whole numbers of more than 4300 digits, nesting beyond `DEPTH`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{json.dumps(value, default=str)[:80]} is no object; each record is one JSON object")
    plain = {}
    for key, item in value.items():
        try:
            plain[_plain(key, str(key), 0)] = _plain(item, str(key), 1)
        except _NotJson as error:
            if lost is not None:
                lost[key] = str(error)
    return plain


def _plain(value: Any, key: str, depth: int) -> Any:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{key!r} holds the lone surrogate {value[error.start]!r}, half of a character; correct the text"
            ) from None
    elif isinstance(value, int):
        if value.bit_length() > DIGIT_BITS:
            raise DataError(f"{key!r} holds a whole number of more than 4300 digits; correct it")
    elif isinstance(value, (dict, list, tuple)):
        if depth == DEPTH:
            raise DataError(f"{key!r} is nested too deeply, beyond {DEPTH} levels; flatten it")
        if isinstance(value, dict):
            return {_plain(k, key, depth): _plain(v, key, depth + 1) for k, v in value.items()}
        return [_plain(item, key, depth + 1) for item in value]
    elif isinstance(value, (Decimal, date, time, timedelta, UUID)):
        return str(value)
    elif isinstance(value, (np.ndarray, np.generic)) and not isinstance(value, (float, bytes)):
        times = value.dtype.kind in "mM"  # their nanoseconds would become whole numbers
        return _plain((value.astype(str) if times else value).tolist(), key, depth)
    elif value is not None and not isinstance(value, float):
        raise _NotJson(type(value).__name__)
    return value

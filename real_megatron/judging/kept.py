"""The readings of an evaluation under way, on disk: one that is stopped goes on behind its last whole batch."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from real_megatron.errors import ConfigError
from real_megatron.files import replace_text, writing
from real_megatron.judging.reading import Answer, Reading

Row = list[Reading]
"""The readings of one example."""


class KeptReadings:
    """A JSONL file: what the readings depend on, then a line an example. Without a path nothing is kept.

    about: settings, model and prompts; readings of another evaluation are thrown away
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path = path
        digest = hashlib.blake2b(json.dumps(about, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
        self._head = json.dumps({"about": digest}) + "\n"

    def begin(self) -> list[Row]:
        """The rows that are there already, in the examples' order; the file is ready for more."""
        if self._path is None:
            return []
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        lines = text.split("\n")
        # The last one is empty, or was cut short.
        whole = [line + "\n" for line in lines[:-1]]
        if not whole or whole[0] != self._head:
            whole = [self._head]
        rows = []
        for number, line in enumerate(whole[1:], start=2):
            try:
                rows.append([_reading(reading) for reading in json.loads(line)])
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ConfigError(
                    f"{self._path}, line {number}: damaged; remove the file to begin this evaluation anew"
                ) from None
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, "".join(whole))
        return rows

    def add(self, rows: Sequence[Row]) -> None:
        """Keep the rows of a further batch."""
        if self._path is not None:
            with writing(self._path), self._path.open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps([asdict(reading) for reading in row]) + "\n" for row in rows)

    def end(self) -> None:
        """The evaluation is complete: the file goes."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _reading(fields: dict[str, Any]) -> Reading:
    answer = fields.pop("answer")
    return Reading(answer=None if answer is None else _answer(answer), **fields)


def _answer(fields: dict[str, Any]) -> Answer:
    aspects = tuple(map(_answer, fields.pop("aspects")))
    return Answer(aspects=aspects, **fields)

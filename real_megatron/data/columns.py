"""Records whose columns have other names than ours, and whose labels are words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from real_megatron.config import DataSource
from real_megatron.errors import DataError

Placed = list[tuple[str, dict[str, Any]]]


def map_columns(source: DataSource, records: Placed, labels: Sequence[str]) -> Placed:
    """The records (place, columns) with `source.columns` under our names too, and the columns `labels`, which hold
    labels, as numbers by `source.labels`. Columns keep their own names beside ours, except one whose name is taken by
    another.

    Raises DataError for a column that no record has, listing those there are, and for a label without a number, naming
    the record.
    """
    if source.columns and records:
        known = dict.fromkeys(name for _, record in records for name in record)
        for ours, theirs in source.columns.items():
            if theirs not in known:
                raise DataError(
                    f"{source.path}: data.*.columns takes {ours!r} from the column {theirs!r}, which no record has; "
                    f"the columns are {', '.join(known)}"
                )
    return [(where, _mapped(source, where, record, labels)) for where, record in records]


def _mapped(source: DataSource, where: str, record: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    mapped = record | {ours: record.get(theirs) for ours, theirs in source.columns.items()}
    if source.labels:
        mapped |= {name: _numbers(source.labels, where, mapped[name]) for name in labels if name in mapped}
    return mapped


def _numbers(known: Mapping[str, float], where: str, given: Any) -> Any:
    """Numbers in place of labels: of one, of a list's, of those of aspects."""
    if isinstance(given, Mapping):
        return {name: _numbers(known, where, label) for name, label in given.items()}
    if isinstance(given, list):
        return [_number(known, where, label) for label in given if label is not None]
    return None if given is None else _number(known, where, given)


def _number(labels: Mapping[str, float], where: str, label: Any) -> float:
    text = json.dumps(label) if isinstance(label, bool) else str(label).strip()  # as the file has it: true, false
    if text not in labels:
        known = ", ".join(labels)
        raise DataError(f"{where}: the label {text[:80]!r} has no number in data.*.labels (it has {known}); add it")
    return labels[text]

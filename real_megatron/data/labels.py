"""Labels of several aspects of a record."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from real_megatron.data.formats import BadRecord, shown
from real_megatron.scores import Aspect


def label_names(column: str, aspects: Sequence[Aspect]) -> list[str]:
    """The columns that may hold labels: `column`, and `column.ASPECT` for each aspect."""
    return [column, *(f"{column}.{aspect.name}" for aspect in aspects)]


def aspect_labels(record: Mapping[str, Any], column: str, aspects: Sequence[Aspect]) -> tuple[float | None, ...]:
    """The label of each aspect, None where the record has none.

    `column` holds a list in the aspects' order, or a mapping of aspects to labels; without it each aspect has a column
    of its own, `column.ASPECT`. A label is a number, or a list of annotations, whose mean counts. null is no label.

    Raises BadRecord for anything else, and for a label outside of its aspect's scores.
    """
    given = record.get(column)
    names = [aspect.name for aspect in aspects]
    if given is None:
        by_name = {aspect.name: record.get(f"{column}.{aspect.name}") for aspect in aspects}
    elif isinstance(given, Mapping):
        if unknown := [name for name in given if name not in names]:
            raise BadRecord(f"{column!r} has the aspect {unknown[0]!r}; scale.aspects has {', '.join(names)}")
        by_name = dict(given)
    elif isinstance(given, list) and len(given) == len(aspects):
        by_name = dict(zip(names, given, strict=True))
    else:
        raise BadRecord(
            f"{column!r} is {shown(given)}; with scale.aspects it must be a list of {len(aspects)} labels (null: "
            f"none), or an object with the keys {', '.join(names)}"
        )
    return tuple(_label(by_name.get(aspect.name), column, aspect) for aspect in aspects)


def _label(given: Any, column: str, aspect: Aspect) -> float | None:
    annotations = [item for item in (given if isinstance(given, list) else [given]) if item is not None]
    if not annotations:
        return None
    try:
        numbers = [math.nan if isinstance(item, bool) else float(item) for item in annotations]
    except (TypeError, ValueError, OverflowError):
        numbers = [math.nan]
    label = fmean(numbers)
    low, high = min(aspect.values), max(aspect.values)
    if not low <= label <= high:
        raise BadRecord(
            f"{column!r} of {aspect.name!r} is {shown(given)}; it must be a number from {low:g} to {high:g}, the "
            "scores of that aspect"
        )
    return label

"""What a user's module with a record format of its own looks like."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from real_megatron.data import BadRecord, Record, register_format

NUMBER = 1


@register_format("graded", needs_label=True)
@register_format("pairs")
def read_pair(row: Mapping[str, Any]) -> Record:
    """`question` and `grades`, a list of numbers."""
    if "question" not in row:
        raise BadRecord("no 'question'; name the column that holds the prompt so")
    return Record({"prompt": row["question"]}, list(row["grades"]), meta={"grades": row["grades"]})


@register_format("shares", by_data_set=True)
def choose(records: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], Record]:
    """`grades` are shares of ten where a record of the data set has a fraction."""
    scale = 10 if any(grade % 1 for record in records for grade in record["grades"]) else 1
    return lambda record: Record({"prompt": record["question"]}, [scale * grade for grade in record["grades"]])

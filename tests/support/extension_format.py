"""What a user's module with a record format of its own looks like."""

from collections.abc import Mapping
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


@register_format("columns", score="first")
def read_column(row: Mapping[str, Any], score: str) -> Record:
    """Any column of numbers, of which users choose one."""
    return Record({"prompt": row["question"]}, [row[score]] if score in row else [])

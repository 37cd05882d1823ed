"""What a user's module with a record format of its own looks like."""

from collections.abc import Mapping
from typing import Any

from real_megatron.data import BadRecord, Record, register_format


@register_format("pairs")
def read_pair(record: Mapping[str, Any]) -> Record:
    """`question` and `grades`, a list of numbers."""
    if "question" not in record:
        raise BadRecord("no 'question'; name the column that holds the prompt so")
    return Record({"prompt": record["question"]}, list(record["grades"]), meta={"grades": record["grades"]})

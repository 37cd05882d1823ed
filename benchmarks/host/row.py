"""One line of the table: a part of the host's work, done the old or the new way, at a number of ranks."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """What one part costs a rank. Numbers are those of the rank that has the most; None: not asked for."""

    part: str
    """What is done, such as "responses to all ranks"; the same in both variants."""
    variant: Literal["before", "after"]
    ranks: int
    seconds: float | None
    """Wall time until the last rank is done."""
    moved: float | None
    """Bytes that the rank receives from others, or reads from files."""
    held: float | None
    """Bytes of memory that the rank needs for it, beside what it has at the end in both variants."""
    how: Literal["measured", "counted"]
    """Counted: worked out by the code from sizes, where this machine has no memory for so many ranks."""

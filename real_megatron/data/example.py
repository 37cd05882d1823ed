"""One judging task."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class JudgeExample:
    """What a judge is asked, and what is known of the right score."""

    id: str
    """Unique within its data set."""
    messages: list[dict[str, str]]
    """The prompt as chat messages, each with `role` and `content`. A last message of the role `assistant` is the
    beginning of the judge's response."""
    label: float = math.nan
    """Ground-truth score y*, on the scale's numeric values; NaN where the data have none. With aspects the mean of
    their labels by weight."""
    cot: str | None = None
    """A critique that goes with the label, without anchor and score; None where the data have none."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further columns of the record, for slicing results; never shown to the judge."""
    labels: tuple[float | None, ...] = ()
    """With aspects the label of each, None where the data have none; one or more have it."""

    @property
    def has_label(self) -> bool:
        return not math.isnan(self.label)

"""One line of the doctor's report."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warning", "broken"]
"""note: it works, but something faster or optional is missing; warning: it may fail later; broken: a run would fail."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found."""

    topic: str
    """Section of the report."""
    name: str
    state: State
    text: str
    fix: str = ""
    """A command, or a sentence, that mends it; empty where there is nothing to mend."""


def guarded(topic: str, name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of `look`. What it raises, as a broken package does on import, is a finding, too."""
    try:
        yield from look()
    except Exception as error:
        yield Finding(
            topic, name, "broken", f"cannot be told: {type(error).__name__}: {error}", "see the packages above"
        )

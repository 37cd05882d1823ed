"""Several scores of one response: the aspects of a rubric."""

from collections.abc import Sequence
from dataclasses import dataclass

from real_megatron.scores.nearest import nearest_score


@dataclass(frozen=True)
class Aspect:
    """One of the scores that a response is given, on a scale of its own."""

    name: str
    """Empty where it is the only one."""
    texts: list[str]
    values: list[float]
    """As of `ScoreScale`."""
    first: int = 0
    """Number of its first score among those of all aspects, one after the other."""
    weight: float = 1.0
    """Of its reward beside the others'."""

    @property
    def columns(self) -> slice:
        """Its scores among those of all aspects."""
        return slice(self.first, self.first + len(self.values))

    def label_index(self, label: float) -> int:
        """Index, within the aspect, of the score whose value is nearest to `label` (`nearest_score`)."""
        return nearest_score(self.values, label)


def weighted_mean(aspects: Sequence[Aspect], numbers: Sequence[float | None]) -> float:
    """The mean of one number an aspect by their weights, over those that are there, of which there must be one."""
    there = [(aspect.weight, number) for aspect, number in zip(aspects, numbers, strict=True) if number is not None]
    return sum(weight * number for weight, number in there) / sum(weight for weight, _ in there)

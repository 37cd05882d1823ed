"""Steps that run through and teach nothing: said when it begins, and marked in the line of every such step."""

import logging

logger = logging.getLogger(__name__)

_FAULTS = {
    "no answer": "no response has a score anchor (and a score, where the reward samples it): warm the model up with "
    "`real-megatron sft`, raise data.max_response_tokens, or set objective.no_anchor to force",
    "all cut off": "every response reached data.max_response_tokens without a score anchor: raise it, or warm the "
    "model up",
    "gradient 0": "it is exactly 0: no response is better than another of its prompt, and no other term has a gradient",
}
"""The mark of each fault, and what it means."""


def faults_of(values: dict[str, float]) -> list[str]:
    """The marks of what is wrong with a step, from its metrics."""
    found = {
        "no answer": values.get("rollout/steps_without_answer", 0.0) > 0,
        "all cut off": values.get("rollout/truncated") == 1.0,
        "gradient 0": values.get("grad_norm") == 0.0,
    }
    return [mark for mark in _FAULTS if found[mark]]


class StepFaults:
    """Warns of a fault in the first of the steps in a row that have it."""

    def __init__(self) -> None:
        self._now: list[str] = []

    def see(self, step: int, values: dict[str, float]) -> list[str]:
        """The marks of a step's faults; those that the step before did not have are logged, in one line."""
        found = faults_of(values)
        new = [f"{mark} ({_FAULTS[mark]})" for mark in found if mark not in self._now]
        if new:
            logger.warning("step %d: %s", step, "; ".join(new))
        self._now = found
        return found

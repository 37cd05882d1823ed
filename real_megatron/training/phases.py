"""Where the seconds of a step go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Wall-clock seconds per named phase; what is in no phase is counted as `other`, so the phases sum to the step.

    Phases do not nest. With a GPU the device is waited for at both ends of a phase, so that work is charged to the
    phase that queued it.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._start = time.perf_counter()
        self._open = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        assert not self._open, "phases do not nest: their sum would exceed the step"
        self._open = True
        start = _now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + _now() - start
            self._open = False

    def finish(self) -> dict[str, float]:
        """Seconds of each phase, `other` and `step` (their sum) since the last call; starts the next step's clock."""
        now = _now()
        step = now - self._start
        phases = {**self._seconds, "other": step - sum(self._seconds.values()), "step": step}
        self._seconds, self._start = {}, now
        return phases


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

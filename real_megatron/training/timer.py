"""Where the seconds of a step go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from real_megatron import progress


class PhaseTimer:
    """Wall-clock seconds per named phase; what is in no phase is counted as `other`, so the phases sum to the step.

    A phase inside another one pauses the outer one. With a GPU the device is waited for at every border, so that work
    is charged to the phase that queued it. For one thread: work that overlaps in another thread is not counted.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open = ["other"]
        self._mark = _now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside of the block to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def finish(self) -> dict[str, float]:
        """Seconds of each phase, `other` and `step` (their sum) since the last call; starts the next step's clock."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return {"other": 0.0, **seconds, "step": sum(seconds.values())}

    def _charge(self) -> None:
        now = _now()
        progress.mark()
        self._seconds[self._open[-1]] = self._seconds.get(self._open[-1], 0.0) + now - self._mark
        self._mark = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

"""Which optimizer updates are not made: those whose loss or gradient is not finite, and spikes of the gradient norm."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from real_megatron.config import OptimizerConfig
from real_megatron.runtime import default_device

WINDOW = 50
"""Made updates whose gradient norms a spike is measured against: their median."""
FEWEST = 10
"""Made updates before the first spike: the norms of the first ones say little about the run."""
_SHOWN = 4


@dataclass
class Fault:
    """What one rank has seen of an update that is not finite."""

    message: str
    examples: list[str] = field(default_factory=list)
    """Ids of the data rows that it belongs to."""


class UpdateGuard:
    """Decides about each update, alike on every rank, and counts.

    The history and the counts are part of a checkpoint (`state`), so that a resumed run decides as one that was not
    stopped. Raises FloatingPointError for the first update that would be skipped after `optimizer.max_skipped` in a
    row.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._seen: list[str] = []
        """What was wrong with each update that was skipped since the last one that was made."""
        self.total = 0
        """Skipped updates of the whole run."""

    def skips(self, loss: float, grad_norm: float, faults: Sequence[Fault], examples: Sequence[str]) -> bool:
        """Whether the update of this loss and gradient norm is to be skipped. Collective.

        faults: what this rank has seen; examples: ids of the update's data rows, of which some are named where no fault
        names any
        """
        bad, norm = _agreed(faults or not math.isfinite(loss) or not math.isfinite(grad_norm), grad_norm)
        if bad:
            why = f"loss {loss}, gradient norm {grad_norm}: not finite"
        elif self._is_spike(norm):
            why = (
                f"loss {loss:.6g}, gradient norm {norm:.6g}: more than optimizer.spike_factor = "
                f"{self._config.spike_factor:g} times {median(self._norms):.6g}, the median of the last "
                f"{len(self._norms)} updates"
            )
        else:
            self._norms.append(norm)
            self._seen = []
            return False
        why += _details(_gathered(faults) if bad else [], examples)
        if len(self._seen) >= self._config.max_skipped:
            raise FloatingPointError(self._end(why))
        self._seen.append(why)
        self.total += 1
        return True

    @property
    def last(self) -> str:
        """What was wrong with the update that was just skipped: loss, gradient norm, ids of some examples."""
        return self._seen[-1]

    @property
    def in_a_row(self) -> int:
        """Updates that were skipped since the last one that was made."""
        return len(self._seen)

    def state(self) -> dict[str, Any]:
        """Plain data, for a checkpoint."""
        return {"norms": list(self._norms), "seen": list(self._seen), "total": self.total}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._norms = deque(state["norms"], maxlen=WINDOW)
        self._seen, self.total = list(state["seen"]), state["total"]

    def _is_spike(self, norm: float) -> bool:
        # A median of 0: nothing was learnt, and the first gradient that is none is no spike.
        factor = self._config.spike_factor
        return factor > 0 and len(self._norms) >= FEWEST and norm > factor * median(self._norms) > 0

    def _end(self, why: str) -> str:
        before = "".join(f"\n  skipped before it: {one}" for one in self._seen)
        return (
            f"{why}. The weights are as before this update (optimizer.max_skipped = {self._config.max_skipped} in a "
            "row). Look at this batch's rows; then resume with more, or start a new run with a lower optimizer.lr, "
            f"where model.path may be the last checkpoint, converted.{before}"
        )


def _agreed(bad: object, norm: float) -> tuple[bool, float]:
    """Whether any rank finds the update bad, and the largest norm of all ranks: what they decide by is bit for bit the
    same."""
    own = torch.tensor([float(bool(bad)), norm if math.isfinite(norm) else 0.0], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        own = own.to(default_device())
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
    found, largest = own.tolist()
    return found > 0, largest


def _gathered(faults: Sequence[Fault]) -> list[Fault]:
    """The faults of all ranks."""
    if not dist.is_initialized():
        return list(faults)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, list(faults))
    return [fault for one in everyone for fault in one]


def _details(faults: Sequence[Fault], examples: Sequence[str]) -> str:
    """Some of the messages, and some ids: of the rows that faults name, else of the batch."""
    named = list(dict.fromkeys(name for fault in faults for name in fault.examples if name))
    messages = list(dict.fromkeys(fault.message for fault in faults if fault.message))
    batch = list(dict.fromkeys(name for name in examples if name))
    text = "".join(f"; {message}" for message in messages[:2])
    for kind, names in (("examples", named), ("examples of the batch", [] if named else batch)):
        if names:
            text += f"; {kind}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
    return text

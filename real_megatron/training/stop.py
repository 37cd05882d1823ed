"""SIGTERM (a scheduler that takes the machine back) becomes a save and a clean end."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

_ECHO_S = 10


class Terminated(Exception):
    """The run was asked to stop; it has saved a checkpoint and can be resumed."""


class StopSignal:
    """Listens for SIGTERM while it is open. The running step is finished first.

    A second SIGTERM takes its ordinary course, unless it comes within 10 s: Slurm signals every process of a job, and
    torchrun passes what it gets on to its workers. Outside of the main thread, where Python delivers no signals, it
    receives nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received_at: float | None = None
        self._previous: Any = None

    def requested(self) -> bool:
        """Whether any rank has received the signal. Collective: all ranks get the same answer."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self._received_at is not None
        flag = torch.tensor([float(self._received_at is not None)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
        elif now - self._received_at > _ECHO_S:
            signal.signal(signal.SIGTERM, self._previous)
            os.kill(os.getpid(), signal.SIGTERM)

"""SIGTERM (a scheduler that takes the machine back) and SIGINT (Ctrl-C) become a save and a clean end."""

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_S = 10


class Terminated(Exception):
    """The run was asked to stop; it has saved a checkpoint and can be resumed.

    number: of the signal
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopSignal:
    """Listens for SIGTERM and SIGINT while it is open. The running step is finished first.

    A second signal ends the process at once, whatever it does (servers end with it). Only a second SIGTERM within 10 s
    is none: Slurm signals every process of a job, and torchrun passes what it gets on to its workers. Ctrl-C comes
    once: torchrun's workers are no part of the terminal's group. Outside of the main thread, where Python delivers no
    signals, it receives nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received: tuple[int, float] | None = None
        """The first signal, and when it came."""
        self._previous: dict[int, Any] = {}

    def requested(self) -> int:
        """The signal that any rank has received; 0 without one. Collective: all ranks get the same answer."""
        number = 0 if self._received is None else self._received[0]
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return number
        flag = torch.tensor([float(number)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, before in self._previous.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = number, now
            # By the system: this function would have to wait for a computation or a collective that never returns.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            name = signal.Signals(number).name
            logger.info("%s: the step under way is finished and saved; a further Ctrl-C ends the run at once", name)
        elif number != self._received[0] or now - self._received[1] > _ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

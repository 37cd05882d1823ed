"""Where a training run dies: at a random moment of a phase, or right before one of its file operations.

Runs inside of a rank. `patched` puts marks around the phases of a run; a `Killer` times them, and ends the process by
SIGKILL at the one that it is told.
"""

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core.dist_checkpointing.strategies import filesystem_async

from real_megatron.rollout.sglang import engine as sglang
from real_megatron.training import rl
from real_megatron.training.session import Session
from real_megatron.training.step_log import StepLog
from real_megatron.training.timer import PhaseTimer

PHASES = ("start", "rollout", "sync", "samples", "update", "save", "evaluate", "row", "resume", "export")
"""In the order of a run; `start` ends where the steps begin, and is called `resume` where a checkpoint is gone on from;
`row` is the writing of a row of metrics."""
SERVED_PHASES = ("start", "resume", "rollout", "send", "update")
"""Of a run with an SGLang server, which start-up starts; `send` is the sending of one bucket of weights."""
BUCKET_BYTES = 16 * 2**10
"""At most, so that the weights of a very small model are many buckets."""
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
"""Audit events (docs.python.org/3/library/audit_events.html) that come right before a file is changed."""


class Killer:
    """Knows of every mark that a rank passes.

    phase, occurrence, after: die this many seconds behind the beginning of the phase's `occurrence`-th time (from 0),
        at its end at the latest
    operation, root: die right before this file operation below `root`, counted from 0
    act: what happens there instead, at the beginning of the phase: `fill` the disk that the second word names, `move`
        the directory that it names, or `remove` it
    """

    def __init__(
        self,
        phase: str | None = None,
        occurrence: int = 0,
        after: float = 0.0,
        operation: int | None = None,
        root: str | None = None,
        act: str = "",
    ) -> None:
        self._act = act
        self._phase, self._occurrence, self._after = phase, occurrence, after
        self._operation, self._root = operation, root
        self._begun: dict[str, list[float]] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in (*PHASES, "send")}
        """How long each phase took, each time."""
        self.operations: list[str] = []
        """The file operations so far."""
        self._watched = 0

    def enter(self, name: str) -> None:
        self._begun.setdefault(name, []).append(time.monotonic())
        if self._due(name):
            if self._act:
                _act(*self._act.split())
            else:
                _die_after(self._after)

    def leave(self, name: str) -> None:
        if self._due(name) and not self._act:
            _die()
        self.seconds[name].append(time.monotonic() - self._begun[name].pop())

    def _due(self, name: str) -> bool:
        return name == self._phase and len(self.seconds[name]) == self._occurrence

    def watch_files(self) -> None:
        """Count this process's file operations from here on, those alone that Python knows of; cannot be undone."""
        self._watched = os.getpid()
        sys.addaudithook(self._file_event)

    def _file_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        if os.getpid() != self._watched:  # a forked writer of tensors
            return
        path = os.fsdecode(arguments[0])
        if self._root is None or not path.startswith(self._root):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if len(self.operations) == self._operation:
            _die()
        self.operations.append(f"{event} {path.removeprefix(self._root)}")


@contextmanager
def patched(killer: Killer) -> Iterator[None]:
    """Tell `killer` when the phases of a run begin and end. `start` and `resume` have begun before."""
    phase_of = {"samples": "samples", "update": "update", "checkpoint": "save"}
    phase, begin, resume, bucketed = PhaseTimer.phase, StepLog.__enter__, Session.resume, sglang.bucketed
    start = "start"

    @contextmanager
    def timed(timer: PhaseTimer, name: str) -> Iterator[None]:
        mark = phase_of.get(name)
        if mark:
            killer.enter(mark)
        with phase(timer, name):
            yield
        if mark:
            killer.leave(mark)

    def resumed(run: Session) -> None:
        nonlocal start
        resume(run)
        if run.start:
            start = "resume"

    def begun(log: StepLog) -> StepLog:
        killer.leave(start)
        return begin(log)

    def sent(stream: Any, limit: int, dtype: Any = None) -> Iterator[Any]:
        for bucket in bucketed(stream, min(limit, BUCKET_BYTES), dtype):
            killer.enter("send")
            yield bucket  # and it is sent
            killer.leave("send")

    def around(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **options: Any) -> Any:
            killer.enter(name)
            result = real(*args, **options)
            killer.leave(name)
            return result

        return marked

    with ExitStack() as held:
        held.enter_context(patch.object(PhaseTimer, "phase", timed))
        held.enter_context(patch.object(Session, "resume", resumed))
        held.enter_context(patch.object(StepLog, "__enter__", begun))
        held.enter_context(patch.object(sglang, "bucketed", sent))
        for holder, attribute, name in (
            (rl, "generate", "rollout"),
            (Session, "publish", "sync"),
            (Session, "evaluate", "evaluate"),
            (StepLog, "step", "row"),
            (Session, "export", "export"),
        ):
            held.enter_context(patch.object(holder, attribute, around(name, getattr(holder, attribute))))
        yield


def kill_writers() -> None:
    """The forked writers of a checkpoint's tensors die."""

    def killed(*_: Any, **__: Any) -> None:
        _die()

    filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(killed)


def _act(what: str, where: str) -> None:
    if what == "fill":
        with open(f"{where}/filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:  # it is full
                pass
    elif what == "move":
        os.rename(where, f"{where}.away")
    elif what == "remove":
        shutil.rmtree(where)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may be delivered to another thread first


class _SigEvent(ctypes.Structure):
    """struct sigevent of linux/siginfo: 64 bytes."""

    _fields_ = [("value", ctypes.c_void_p), ("signo", ctypes.c_int), ("notify", ctypes.c_int)] + [
        ("padding", ctypes.c_char * 48)
    ]


class _Timer(ctypes.Structure):
    """struct itimerspec: interval and first expiry, in seconds and nanoseconds."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "after_s", "after_ns")]


def _die_after(seconds: float) -> None:
    """By a timer of the kernel, which needs no thread and no lock of Python."""
    if seconds <= 0:
        _die()
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _SigEvent(None, signal.SIGKILL, 0)  # SIGEV_SIGNAL
    if libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")
    when = _Timer(0, 0, int(seconds), max(1, int(seconds % 1 * 1e9)))
    if libc.timer_settime(timer, 0, ctypes.byref(when), None):
        raise OSError(ctypes.get_errno(), "timer_settime")


def below(root: Path) -> str:
    """The root of file operations below a directory."""
    return f"{root}/"

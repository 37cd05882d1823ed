"""Child processes that end when their parent does, however it dies."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import process
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Found before any fork: a child must not wait for the loader's lock, which a thread of its parent may have held.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

_forking: int | None = None


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent`, our parent's process id, that has started us ends.

    Also when it is killed itself, so that nothing runs on with its memory, its GPU or its pipes. Linux alone has this;
    elsewhere nothing is done.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has died before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def forks_end_with_us() -> Iterator[None]:
    """Processes forked inside, by whichever package, end with this one."""
    global _forking
    before, _forking = _forking, os.getpid()
    try:
        yield
    finally:
        _forking = before


@contextmanager
def killed_children_raise(what: str) -> Iterator[None]:
    """Raise ChildProcessError inside where a process of `multiprocessing` is killed, as by the kernel when memory is
    short: whoever waits for its answer would wait for ever. Nothing is done outside of the main thread.

    what: such a process, for the message
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(number: int, frame: FrameType | None) -> None:
        for child in list(process._children):  # type: ignore[attr-defined]  # active_children() forgets the dead
            with suppress(ChildProcessError):  # somebody has asked for its status
                # It stays to be asked for: multiprocessing may be about to.
                end = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if end is not None and end.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                    killed.append(end.si_status)
        if killed:
            raise ChildProcessError(f"{what} was killed by {signal.Signals(killed[0]).name}")

    killed: list[int] = []
    before = signal.signal(signal.SIGCHLD, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _forked() -> None:
    global _forking
    parent, _forking = _forking, None
    if parent is not None:
        end_with(parent)


os.register_at_fork(after_in_child=_forked)

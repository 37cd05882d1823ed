"""Child processes that end when their parent does, however it dies."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def _forked() -> None:
    global _forking
    parent, _forking = _forking, None
    if parent is not None:
        end_with(parent)


os.register_at_fork(after_in_child=_forked)

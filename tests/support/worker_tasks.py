"""Tasks for bridge.workers, which its processes must be able to import."""

import ctypes
import os
import signal
import time
from pathlib import Path

from real_megatron.bridge.workers import Progress


def write_on_and_on(task: tuple[str, Path], progress: Progress) -> None:
    """One task fails once the other one writes; the other one puts a file into its folder every 10 ms."""
    kind, folder = task
    while kind != "write" and not any(folder.iterdir()):
        time.sleep(0.01)
    if kind == "raise":
        raise ValueError("no such tensor")
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    for i in range(3000):
        (folder / str(i)).touch()
        progress(1)
        time.sleep(0.01)


def signals(task: int, progress: Progress) -> tuple[bool, int]:
    """Whether SIGINT is blocked in this process, and the signal that it gets when its parent dies (Linux)."""
    on_death = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(on_death), 0, 0, 0)  # PR_GET_PDEATHSIG
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []), on_death.value

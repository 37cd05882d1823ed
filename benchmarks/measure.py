"""Time and peak memory: of a call, of this process, and of a command with all its child processes.

A device is "cpu" or "cuda". Memory of a GPU is what torch's allocator has given out; memory of a CPU is the resident
set, read from /proc, so that Linux is needed.
"""

import contextlib
import ctypes
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

MIB = 1 << 20


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def fastest(call: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def reset_peak(device: str) -> int:
    """Let `peak_bytes` count from now on; returns the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_bytes(b"5")  # resets VmHWM
    return _resident("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes that this process has had in use since its start, or since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def return_freed_memory() -> None:
    """Make glibc return every freed block of a MiB or more at once: the resident set then shows what is in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, MIB)  # M_MMAP_THRESHOLD


def run_command(command: Sequence[str]) -> tuple[float, int]:
    """Run a command: its seconds, and the peak over time of the resident bytes of all its processes together.

    The processes are sampled every 20 ms. Raises RuntimeError with the command's stderr when it fails.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_resident_bytes(p) for p in _process_tree(process.pid)))
        time.sleep(0.02)
    reader.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[0]}")
    return time.monotonic() - start, peak


def _process_tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0

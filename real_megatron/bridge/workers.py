"""Independent tasks over processes, with one progress bar in bytes."""

import logging
import multiprocessing as mp
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from real_megatron.errors import CheckpointError
from real_megatron.processes import end_with
from real_megatron.terminal import Counter

Progress = Callable[[int], None]
Work = Callable[[Any, Progress], Any]

_state: dict[str, Any] = {}


def run(
    work: Work, tasks: Sequence[Any], total_bytes: int, workers: int, title: str, show_progress: bool = True
) -> list[Any]:
    """`work(task, progress)` for each task; results in order. `progress(n)` reports n more bytes done.

    `work` and tasks must be picklable. One worker runs in this process. An exception in any task ends the run: the
    other tasks stop at their next `progress`, and none still runs when this returns; Ctrl-C does the same. Raises
    CheckpointError when a process is killed.
    """
    own = 0
    with Counter("bytes", show_progress) as shown:

        def advance(count: int) -> None:
            nonlocal own
            own += count
            shown(title, own, total_bytes)

        advance(0)

        if min(workers, len(tasks)) <= 1:
            return [work(task, advance) for task in tasks]
        context = mp.get_context("spawn")
        done, stop = context.Value("q", 0), context.Value("b", 0, lock=False)
        verbose = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)
        start = (work, done, stop, verbose, os.getpid())
        with ProcessPoolExecutor(min(workers, len(tasks)), context, _start, start) as pool:
            try:
                with _interrupts_blocked():  # the processes start here, and inherit it
                    futures = [pool.submit(_run, task) for task in tasks]
                    # The pool watches the processes that it knew at the last submission: a death of the last one would
                    # not be noticed before another's task has ended.
                    pool.submit(int)
                pending = set(futures)
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    # Without the lock: a process that was killed may hold it.
                    shown(title, done.get_obj().value, total_bytes)
                    for future in finished:
                        future.result()
            except BrokenProcessPool as fault:
                raise CheckpointError(
                    f"{title}: a worker process was killed, most often for want of memory; run again with fewer "
                    "workers (workers, --workers)"
                ) from fault
            except BaseException:
                # Wait for all: a process that still writes would put files into a directory that was removed.
                stop.value = 1
                pool.shutdown(cancel_futures=True)
                raise
        shown(title, done.value, total_bytes)
        return [future.result() for future in futures]


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal's group. It is for this one, which ends the others; else each of
    them would write a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(work: Work, done: Any, stop: Any, verbose: bool, parent: int) -> None:
    end_with(parent)
    if not verbose:
        warnings.simplefilter("ignore")  # other packages' would go to the terminal, between the lines of this one
    torch.set_num_threads(1)
    _state["work"], _state["done"], _state["stop"] = work, done, stop


def _run(task: Any) -> Any:
    return _state["work"](task, _report)


class _Stopped(Exception):
    """Another task failed."""


def _report(count: int) -> None:
    if _state["stop"].value:
        raise _Stopped
    done = _state["done"]
    with done.get_lock():
        done.value += count

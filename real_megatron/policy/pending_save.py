"""A checkpoint whose files are written while training goes on."""

import multiprocessing
import pickle
import queue
import signal
import tempfile
from collections.abc import Callable
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from real_megatron.policy import cpu
from real_megatron.processes import forks_end_with_us, killed_children_raise

WRITER = "a process that writes the checkpoint"
"""For the error where one is killed."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Results:
    """What the writing process hands to Megatron's last step: a queue of one item, in a file without a name.

    Megatron's own queue is a process, which would outlive a killed trainer; and a pipe is full at 64 KiB, so that a
    writer would wait for a reader that waits for its end.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # of both processes, as long as this is needed

    def put(self, item: Any) -> None:
        """Keep the item in place of one before it."""
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(item, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The item. Raises queue.Empty where there is none."""
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        return pickle.loads(data)


class PendingSave:
    """A save under way on this rank: a fork of it, with its memory as it is now, writes.

    What is on a GPU is copied to the host before the constructor returns, so that training may change all of it at
    once. The fork ends with this process. It does not hear SIGTERM and SIGINT, which torchrun and terminals send to a
    whole group: the trainer waits for it, or gives it up.

    request: what Megatron's `dist_checkpointing.save` returns for an asynchronous save; results: its queue
    """

    def __init__(self, request: AsyncRequest, results: Results) -> None:
        self._finalize, self._results = request.finalize_fns, results
        self._process = None
        if request.async_fn is None:  # nothing to write on this rank
            return
        # Kept until the end: the allocator of pinned memory, which a fork shares, would hand it out again.
        self._staged = list(request.async_fn_args)
        if request.preload_fn is not None:
            self._staged[1] = request.preload_fn()
        arguments = (request.async_fn, self._staged, request.async_fn_kwargs, results)
        self._process = multiprocessing.get_context("fork").Process(target=_write, args=arguments)
        with forks_end_with_us():
            self._process.start()

    def done(self) -> bool:
        """Whether this rank has nothing left to write."""
        return self._process is None or not self._process.is_alive()

    def finish(self) -> None:
        """Wait for this rank's files, then for all ranks' and describe them: the checkpoint is whole. Collective.

        Raises CheckpointException on all ranks where a rank could not write, as on a full disk, or its writing process
        was killed.
        """
        if self._process is not None:
            self._process.join()
            code = self._process.exitcode or 0
            if code < 0:
                self._results.put(_killed(-code))
        with cpu.device_mode():
            for finalize in self._finalize:
                finalize()

    def give_up(self) -> None:
        """End the writing; what it leaves is no checkpoint."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _write(write: Callable[..., None], arguments: list[Any], options: dict[str, Any], results: Results) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        with forks_end_with_us(), killed_children_raise(WRITER):
            write(*arguments, **options)
    except Exception as error:
        results.put(error)


def _killed(number: int) -> ChildProcessError:
    return ChildProcessError(f"{WRITER} was killed by {signal.Signals(number).name}")

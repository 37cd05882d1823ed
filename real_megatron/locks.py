"""One job at a time writes an output: a lock that ends with the process that holds it."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from real_megatron.errors import OutputInUse
from real_megatron.files import check_in_place, in_place

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()
"""File descriptors of the locks of this process."""


@contextmanager
def only_writer(output: str | Path, *, inside: bool = False) -> Iterator[Callable[[], None]]:
    """Keep every other job, of this process or another, from writing `output` meanwhile.

    output: a file, or a directory that appears as a whole; with `inside` a directory in which the job writes

    Yields a function that raises Vanished where the side file, and so what it guards, was removed or renamed since.

    The lock is `flock` on a side file, `.NAME.lock` beside the output or `.lock` in it, which is removed at the end.
    The operating system releases it when the process ends, however it ends, so that a side file that a killed job has
    left locks nothing. Child processes do not hold it. A job of several ranks takes it on rank 0, for all.

    On a network file system the lock reaches as far as the file system's own: NFS and Lustre with `flock` lock for all
    nodes (and may keep the lock of a node that crashed for a minute or two); mounted with `nolock` or `localflock`,
    jobs on different nodes do not see each other. Where there are no locks at all, this is logged and nothing is
    locked.

    Raises OutputInUse, naming who writes it, when another job does; OSError when the side file cannot be made.
    """
    output = Path(output)
    whole = output.resolve()
    lock = whole / ".lock" if inside else whole.with_name(f".{whole.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(output, lock)
    _held.add(handle)
    try:
        yield lambda: check_in_place(lock, handle)
    finally:
        if in_place(lock, handle):  # first, since somebody else's may be of this name once the lock is free
            lock.unlink(missing_ok=True)
        _held.discard(handle)
        os.close(handle)


def hold(stack: ExitStack, output: str | Path) -> None:
    """Be the `only_writer` of `output` until `stack` is closed."""
    stack.enter_context(only_writer(output))


def _take(output: Path, lock: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                holder = os.pread(handle, 1000, 0).decode(errors="replace")
                os.close(handle)
                if not isinstance(error, (BlockingIOError, PermissionError)):
                    raise
                raise OutputInUse(
                    f"{output} is being written by another job{holder and f' ({holder})'}: wait until it has ended, or "
                    "choose another output"
                ) from None
            logger.warning(
                "%s: its file system has no locks (%s): see to it that no second job writes there", output, error
            )
        if in_place(lock, handle):
            break
        os.close(handle)  # its holder has removed it meanwhile
    with suppress(OSError):  # a full disk: only the other job's message is poorer
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return handle


def _close_in_child() -> None:
    # A forked child shares the lock: it would hold it for as long as it lives.
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)

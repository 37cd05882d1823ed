"""Results as files: whole or not there, and a disk that is full is named with the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace_text(path: Path, text: str) -> None:
    """Give `path` this text, as UTF-8 with the line ends as they are, at once: whenever the process dies, the file is
    the old one or the new one.

    A lone surrogate, which has no UTF-8 form, becomes the JSON escape that it came from. Raises as `writing`.
    """
    fresh = path.with_name(path.name + ".tmp")
    with writing(path):
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
        os.replace(fresh, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in the OSError of a write inside, and what to do: the operating system's own says neither."""
    try:
        yield
    except OSError as error:
        what = f"{path}: cannot be written ({error.strerror or error})"
        if error.errno in _FULL:
            raise OSError(f"{what}: make room there, and run the same command again to go on") from error
        if error.errno in (errno.ENOENT, errno.ESTALE):
            raise Vanished(f"{what}: {GONE}") from error
        if error.filename is None:
            raise OSError(what) from error
        raise


def append(handle: int, data: bytes) -> None:
    """Write all of `data` to an open file now: no buffer keeps what a full disk has refused."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


GONE = (
    "its directory was removed or renamed while it was written to. Put it back, or begin anew; then run the same "
    "command again"
)


class Vanished(OSError):
    """What a job writes to is no longer where it was."""


def in_place(path: Path, handle: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def check_in_place(path: Path, handle: int) -> None:
    """Raise Vanished unless `path` still names the open file: what is written to another, nobody would find."""
    if not in_place(path, handle):
        raise Vanished(f"{path}: is no longer the file that was opened: {GONE}")

"""A run without progress ends with the stacks of all its ranks, so that a launcher starts it again.

Ranks know of each other through a directory that all of them see, `stacks/START/` of the output: a stuck rank is in no
state for a collective. `progress` is touched by every rank that makes progress, `rank-NNNNN.txt` takes a rank's stacks,
`request` says that they are to be written, `gathered` that they are together in `stacks/START.txt`.
"""

import faulthandler
import logging
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from real_megatron import progress
from real_megatron.files import replace_text
from real_megatron.runtime import from_rank_0, rank, world_size

logger = logging.getLogger(__name__)

EXIT_STUCK = 1
"""Status of every rank: a failure, for torchrun and schedulers."""
POLL_S = 10.0
"""Longest time between two looks at the directory; a twentieth of a short limit."""
GRACE_S = 120.0
"""How long the ranks that have written their stacks wait for the others, whose file system may show a request late."""

_MARGIN_S = 10.0
"""Behind `GRACE_S`, before what cannot be written any more is given up."""
_END = "-- end of rank"


@contextmanager
def watching(output: Path, minutes: float) -> Iterator[None]:
    """End this process and those of all other ranks when no rank has made progress (`progress.mark`) for `minutes`;
    0: never. Collective at the beginning; leaves nothing behind where all went well.

    Each rank has a thread that looks and sleeps. Where no thread of Python gets its turn, since one holds the
    interpreter's lock, faulthandler's timer, which needs none, writes the stacks and ends the process instead.
    """
    if not minutes:
        yield
        return
    place = from_rank_0(lambda: _new_place(output / "stacks"))
    watchdog = Watchdog(place, 60 * minutes, rank(), world_size())
    try:
        yield
    finally:
        watchdog.close()


def _new_place(stacks: Path) -> Path:
    """A directory of this start; those of earlier ones that were killed, and wrote nothing, go."""
    stacks.mkdir(parents=True, exist_ok=True)
    for old in stacks.iterdir():
        if old.is_dir() and not (old / "request").exists():
            shutil.rmtree(old, ignore_errors=True)
    place = stacks / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    place.mkdir()
    (place / "progress").touch()
    return place


class Watchdog:
    """One rank's; see `watching`. limit: seconds without progress."""

    def __init__(self, place: Path, limit: float, rank: int, world: int) -> None:
        self._place, self._limit, self._rank, self._world = place, limit, rank, world
        self._poll = min(POLL_S, limit / 20)
        place.mkdir(parents=True, exist_ok=True)  # a network file system may show it late
        self._file = _stacks_of(place, rank).open("w", encoding="utf-8")
        self._file.write(f"rank {rank}, process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching. Not collective."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        with suppress(OSError):
            _stacks_of(self._place, self._rank).unlink()
            if self._rank == 0:
                (self._place / "progress").unlink()
        for directory in (self._place, self._place.parent):
            with suppress(OSError):  # another rank's file is still there, or the stacks of an earlier start
                directory.rmdir()

    def _watch(self) -> None:
        marks, since = -1, time.monotonic()
        touched: int | None = None
        while True:
            # Of this thread alone: it comes to this line again unless it gets no turn.
            faulthandler.dump_traceback_later(self._limit + 2 * self._poll, exit=True, file=self._file)
            if self._closed.wait(self._poll):
                return
            now = progress.marks()
            try:
                if now != marks:
                    os.utime(self._place / "progress")
                seen: int | None = (self._place / "progress").stat().st_mtime_ns
                requested = (self._place / "request").exists()
            except OSError:
                # The directory is gone, or cannot be reached: this rank's own progress is all that it knows.
                seen, requested = touched, False
            if now != marks or seen != touched:
                marks, touched, since = now, seen, time.monotonic()
            if requested:
                self._end(asked=False)
            if time.monotonic() - since > self._limit:
                self._end(asked=True)

    def _end(self, asked: bool) -> None:
        """Write the stacks, wait for those of the others, and end the process. asked: this rank is stuck by itself; the
        first one of them puts them together. Ends it, too, where a log or a file takes no more, or holds its lock."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(GRACE_S + 2 * self._poll + _MARGIN_S, exit=True, file=nowhere)
        try:
            first = asked and _make(self._place / "request")
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.write(f"{_END} {self._rank}\n")
            self._file.flush()
            deadline = time.monotonic() + GRACE_S
            if first:
                texts = self._others(deadline)
                where = self._place.with_suffix(".txt")
                replace_text(where, together(texts))
                _make(self._place / "gathered")
                logger.error(
                    "no rank has made progress for %g minutes (parallel.stuck_minutes): the stacks of %d of %d ranks "
                    "are in %s; the run ends, the same command goes on from the last checkpoint",
                    self._limit / 60,
                    sum(text is not None for text in texts),
                    self._world,
                    where,
                )
            else:  # the first one needs a moment behind the deadline of its own
                while not (self._place / "gathered").exists() and time.monotonic() < deadline + 2 * self._poll:
                    time.sleep(min(1.0, self._poll))
        except Exception:
            logger.exception("the stacks of a stuck run could not be gathered")
        finally:
            # At once: the thread that is stuck would not return, and may hold the lock of a log. Servers end with this
            # process (processes.py).
            os._exit(EXIT_STUCK)

    def _others(self, deadline: float) -> list[str | None]:
        """The stacks of all ranks; None of those that have not written them by the deadline."""
        while True:
            texts = [_read(_stacks_of(self._place, number)) for number in range(self._world)]
            if None not in texts or time.monotonic() > deadline:
                return texts
            time.sleep(min(1.0, self._poll))


def together(texts: list[str | None]) -> str:
    """Stacks by rank as one text: equal ones once, with the numbers of their ranks."""
    groups: dict[str, list[int]] = {}
    heads: list[str] = []
    for number, text in enumerate(texts):
        if text is None:
            heads.append(f"rank {number} has written none: a thread of it holds the interpreter's lock, or it is gone")
            continue
        head, _, stacks = text.partition("\n")
        heads.append(head)
        body = stacks.partition(f"{_END} ")[0]
        groups.setdefault(re.sub(r"0x[0-9a-f]+", "", body), []).append(number)
    parts = [f"===== rank{'s' * (len(of) > 1)} {', '.join(map(str, of))}\n\n{text}" for text, of in groups.items()]
    return "\n".join([*heads, "", *parts])


def _stacks_of(place: Path, number: int) -> Path:
    return place / f"rank-{number:05d}.txt"


def _read(path: Path) -> str | None:
    """The stacks in a rank's file, once they are whole."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text if _END in text or "Timeout (" in text else None


def _make(path: Path) -> bool:
    """Make an empty file; whether it was not there."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True

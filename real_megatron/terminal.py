"""The terminal: one console that log lines and progress bars share, so that they do not overwrite each other."""

import logging
import os
import threading
import time
import warnings
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

CONSOLE = Console(stderr=True)
OURS = "real_megatron"
LINE_EVERY_S = 30.0
_NUMBERS = 54
"""Columns that a bar's name, counts and times need."""

logger = logging.getLogger(__name__)


def set_up_logging(rank: int, verbose: bool = False) -> None:
    """Log to the terminal: from INFO on rank 0, from WARNING on the others, which say their rank.

    Of other packages errors are shown, and with `verbose` everything: their log, and Python's warnings, whose place is
    then named. The bars of Hugging Face's libraries are for terminals; call this before they are imported.
    """
    text = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    if CONSOLE.is_terminal:
        handler: logging.Handler = RichHandler(console=CONSOLE, show_path=False, markup=False)
    else:  # a file or pipe: one line per record, not wrapped to a terminal's width
        handler = logging.StreamHandler()
        text = "%(asctime)s " + text
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler.addFilter(lambda record: verbose or _is_ours(record) or record.levelno >= logging.ERROR)
    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=text, datefmt="%X", handlers=[handler], force=True)
    # Warnings become records of the logger `py.warnings`, which the filter above holds back unless verbose.
    logging.captureWarnings(True)
    # Torch's loggers have a handler of their own. This one warns of a CUDA toolkit without a GPU, as on a login node.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.DEBUG if verbose else logging.ERROR)
    if verbose:
        warnings.simplefilter("default")
        for busy in ("asyncio", "aiohttp", "matplotlib", "PIL", "filelock"):  # a line a request, a font, a lock
            logging.getLogger(busy).setLevel(logging.INFO)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name == OURS or record.name.startswith(OURS + ".")


class _Figures(ProgressColumn):
    """Those of a task's figures that there is room for, whole."""

    def render(self, task: Task) -> Text:
        room, shown = CONSOLE.width - _NUMBERS - 24, ""
        for figure in task.fields["figures"].split("  "):
            if len(shown) + 2 + len(figure) > room:
                break
            shown += f"  {figure}" if shown else figure
        return Text(shown, no_wrap=True)


def progress(enabled: bool, count: ProgressColumn | None = None) -> Progress:
    """A bar per task: done of total (or `count`), elapsed, remaining, and the task's field `figures`."""
    return Progress(
        TextColumn("{task.description}"),
        # On a narrow terminal the bar is shorter, and figures are left out: rich would cut the numbers.
        BarColumn(bar_width=max(4, min(24, CONSOLE.width - _NUMBERS))),
        count or MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        _Figures(),
        console=CONSOLE,
        disable=not (enabled and CONSOLE.is_terminal),
    )


class Counter:
    """How much of a job is done: a bar on a terminal; in a file or pipe a log line every `LINE_EVERY_S`, also where
    nothing new is done, so that a job that hangs does not look like one that works.

    Tell it by calling it. unit: of what is counted; `bytes` are shown as MB or GB
    """

    def __init__(self, unit: str, enabled: bool = True) -> None:
        self._unit, self._enabled = unit, enabled
        self._now: tuple[str, int, int] | None = None
        self._begin = 0.0
        self._bar = progress(enabled, DownloadColumn() if unit == "bytes" else None)
        self._ended = threading.Event()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are done of the part of the job that is called `what`."""
        if self._now is None or self._now[0] != what:
            self._begin = time.monotonic()
            self._task = self._bar.add_task(what, total=total, figures="")
        self._now = what, done, total
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        if self._enabled and not CONSOLE.is_terminal:
            threading.Thread(target=self._write_lines, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bar.stop()

    def _write_lines(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            if self._now is not None:
                what, done, total = self._now
                unit, scale = ("MB", 10**6) if self._unit == "bytes" else (self._unit, 1)
                minutes, seconds = divmod(int(time.monotonic() - self._begin), 60)
                so_far = f"{done // scale:,} of {total // scale:,} {unit}"
                logger.info("%s: %s after %d:%02d min", what, so_far, minutes, seconds)

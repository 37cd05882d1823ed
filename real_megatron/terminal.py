"""The terminal: one console that log lines and progress bars share, so that they do not overwrite each other."""

import logging
import os
import warnings

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)
OURS = "real_megatron"


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


def progress(enabled: bool) -> Progress:
    """A bar per task: done of total, elapsed, remaining, and the task's field `figures`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=CONSOLE,
        disable=not (enabled and CONSOLE.is_terminal),
    )

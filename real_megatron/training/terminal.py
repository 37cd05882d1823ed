"""The terminal: one console that log lines and progress bars share, so that they do not overwrite each other."""

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)


def set_up_logging(rank: int) -> None:
    """Log to the terminal: from INFO on rank 0, from WARNING on the others, which say their rank."""
    handler = RichHandler(console=CONSOLE, show_path=False, markup=False)
    text = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=text, datefmt="%X", handlers=[handler], force=True
    )
    # Requests and event files are not what a run is about.
    for chatty in ("httpx", "filelock", "megatron", "datasets", "torch", "matplotlib"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


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
        disable=not enabled,
    )

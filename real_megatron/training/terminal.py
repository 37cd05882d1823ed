"""The terminal: one console that log lines and progress bars share, so that they do not overwrite each other."""

import logging
import warnings

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)


def set_up_logging(rank: int) -> None:
    """Log to the terminal: from INFO on rank 0, from WARNING on the others, which say their rank."""
    text = "%(message)s" if rank == 0 else f"rank {rank}: %(message)s"
    if CONSOLE.is_terminal:
        handler: logging.Handler = RichHandler(console=CONSOLE, show_path=False, markup=False)
    else:  # a file or pipe: one line per record, not wrapped to a terminal's width
        handler = logging.StreamHandler()
        text = "%(asctime)s " + text
    level = logging.INFO if rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=text, datefmt="%X", handlers=[handler], force=True)
    # What is optional and absent is said by the documentation, not at every start.
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for chatty in ("httpx2", "filelock", "megatron", "datasets", "torch", "matplotlib", "transformers"):
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
        disable=not (enabled and CONSOLE.is_terminal),
    )

"""Which checkpoints exist, and how one comes into being: whole or not at all."""

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step-(\d+)")


class CheckpointStore:
    """Checkpoints `step-NNNNNN` of one run in a directory that all ranks see.

    A checkpoint is written under another name and renamed when every rank has finished, so a directory with this name
    is complete, and a killed save or removal leaves only a `.partial` directory that the next save clears away.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def newest(self) -> tuple[int, Path] | None:
        """Step and directory of the newest complete checkpoint. Collective: rank 0 looks, all ranks get its answer."""
        found = [max(self._complete(), default=None)]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        return found[0]

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a directory on all ranks, then publish it and drop the oldest beyond `keep`. Collective.

        Raises OSError when it cannot be written, as on a full disk; the checkpoints before it stand.
        """
        final = self.directory / f"step-{step:06d}"
        partial = final.with_suffix(".partial")
        if _rank() == 0:
            if final.exists():
                _remove(final)
            for leftover in self.directory.glob("*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        _barrier()
        with mendable(f"{partial}: cannot be written", "make room there, and run the same command again to go on"):
            write(partial)
        _barrier()
        if _rank() == 0:
            partial.rename(final)
            for _, path in sorted(self._complete())[: -self.keep]:
                _remove(path)
            logger.info("saved %s", final)
        _barrier()
        return final

    def _complete(self) -> list[tuple[int, Path]]:
        matches = ((_COMPLETE.fullmatch(path.name), path) for path in self.directory.glob("step-*"))
        return [(int(match[1]), path) for match, path in matches if match]


@contextmanager
def mendable(what: str, mend: str) -> Iterator[None]:
    """Turn the errors of checkpointing, which hold every rank's whole traceback, into an OSError of one line."""
    try:
        yield
    except CheckpointException as error:
        reasons = dict.fromkeys(str(failure).strip() for failure, _ in error.failures.values())
        raise OSError(f"{what} ({'; '.join(reasons)}): {mend}") from error
    except CheckpointingException as error:
        raise OSError(f"{what} ({error}): {mend}") from error


def _remove(checkpoint: Path) -> None:
    """Under another name first, so that one that is half gone is not taken for whole."""
    gone = checkpoint.with_suffix(".partial")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

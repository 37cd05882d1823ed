"""Which checkpoints exist, and how one comes into being: whole or not at all."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step-(\d+)")


class CheckpointStore:
    """Checkpoints `step-NNNNNN` of one run in a directory that all ranks see.

    A checkpoint is written under another name and renamed when every rank has finished, so a directory with this name
    is complete, and a killed save leaves only a `.partial` directory that the next save clears away.
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
        """Let `write` fill a directory on all ranks, then publish it and drop the oldest beyond `keep`. Collective."""
        final = self.directory / f"step-{step:06d}"
        partial = final.with_suffix(".partial")
        if _rank() == 0:
            for leftover in (*self.directory.glob("*.partial"), final):
                if leftover.exists():
                    shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        _barrier()
        write(partial)
        _barrier()
        if _rank() == 0:
            partial.rename(final)
            for _, path in sorted(self._complete())[: -self.keep]:
                shutil.rmtree(path)
            logger.info("saved %s", final)
        _barrier()
        return final

    def _complete(self) -> list[tuple[int, Path]]:
        matches = ((_COMPLETE.fullmatch(path.name), path) for path in self.directory.glob("step-*"))
        return [(int(match[1]), path) for match, path in matches if match]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()

"""The training checkpoints of a run: which exist, and writing one whole or not at all."""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from real_megatron.files import writing
from real_megatron.policy.checkpoint_errors import explain_checkpoint_errors
from real_megatron.policy.pending_save import PendingSave
from real_megatron.runtime import barrier, default_device, from_rank_0

logger = logging.getLogger(__name__)

_COMPLETE = re.compile(r"step-(\d+)")
# A network file system may show a new directory to other nodes with a delay.
_VISIBLE_S = 60


class CheckpointStore:
    """Checkpoints `step-NNNNNN` of one run in a directory that all ranks see.

    A checkpoint is written under another name and renamed when every rank has finished, so a directory with this name
    is complete, and a killed save or removal leaves only a `.partial` directory, which the next start or save clears.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        self.held: int | None = None
        """The step of a checkpoint that stays, however old it is; known to rank 0."""
        self._pending: tuple[int, PendingSave] | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint after `step` steps is, once it is complete."""
        return self.directory / f"step-{step:06d}"

    def newest(self) -> tuple[int, Path] | None:
        """Step and directory of the newest complete checkpoint. Collective: rank 0 looks, all ranks get its answer."""
        return from_rank_0(lambda: max(self._complete(), default=None))

    def clear(self) -> None:
        """Remove what a killed save or removal has left. Collective."""
        from_rank_0(self._clear)

    def count(self) -> int:
        """How many complete checkpoints there are."""
        return len(self._complete())

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a directory on all ranks, then publish it and `prune`. Collective.

        Raises OSError when it cannot be written, as on a full disk, or when the ranks do not see one file system; the
        checkpoints before it stand.
        """
        partial = self._prepare(step)
        with _explained(partial):
            write(partial)
        return self._publish(step)

    def begin(self, step: int, write: Callable[[Path], PendingSave]) -> None:
        """`save`, of which `write` only begins the writing: `settle` publishes it. Collective. Errors as of `save`."""
        partial = self._prepare(step)
        with _explained(partial):
            self._pending = step, write(partial)

    def settle(self, wait: bool = True) -> None:
        """Publish the checkpoint that is being written, if there is one. Collective. Errors as of `save`.

        wait: False: only where all ranks have written their files by now.
        """
        if self._pending is None:
            return
        step, pending = self._pending
        if not wait and not _all_ranks(pending.done()):
            return
        self._pending = None
        with _explained(self._partial(step)):
            pending.finish()
        self._publish(step)

    def give_up(self) -> None:
        """End the writing of a checkpoint that is not whole yet; the next start removes what there is of it."""
        if self._pending is not None:
            self._pending[1].give_up()
            self._pending = None

    def _partial(self, step: int) -> Path:
        return self.path(step).with_suffix(".partial")

    def _prepare(self, step: int) -> Path:
        """An empty directory that all ranks see, once the checkpoint before it is published."""
        self.settle()
        final, partial = self.path(step), self._partial(step)

        def make() -> None:
            with writing(partial):
                if final.exists():
                    _remove(final)
                self._clear()
                partial.mkdir(parents=True)

        from_rank_0(make)
        _check_visible(partial)
        return partial

    def _publish(self, step: int) -> Path:
        final, partial = self.path(step), self._partial(step)

        def rename() -> None:
            with writing(partial):
                partial.rename(final)
                self.prune()
            logger.info("saved %s", final)

        barrier()
        from_rank_0(rename)
        return final

    def prune(self) -> None:
        """Drop the oldest beyond `keep`, but for the one that is held. By rank 0."""
        for step, path in sorted(self._complete())[: -self.keep]:
            if step != self.held:
                _remove(path)

    def _clear(self) -> None:
        for leftover in self.directory.glob("*.partial"):
            shutil.rmtree(leftover)

    def _complete(self) -> list[tuple[int, Path]]:
        matches = ((_COMPLETE.fullmatch(path.name), path) for path in self.directory.glob("step-*"))
        return [(int(match[1]), path) for match, path in matches if match]


def reading(checkpoint: Path) -> AbstractContextManager[None]:
    """Turn what can go wrong while a checkpoint is read into an OSError that says what to do."""
    return explain_checkpoint_errors(
        f"{checkpoint}: cannot be read", "remove it to resume from the checkpoint before it, if there is one"
    )


@contextmanager
def _explained(partial: Path) -> Iterator[None]:
    fix = "make room there, and run the same command again to go on"
    with explain_checkpoint_errors(f"{partial}: cannot be written", fix), writing(partial):
        yield


def _all_ranks(yes: bool) -> bool:
    """Whether it is so on all ranks. Collective."""
    if not dist.is_initialized():
        return yes
    flag = torch.tensor([float(yes)], device=default_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _remove(checkpoint: Path) -> None:
    """Under another name first, so that one that is half gone is not taken for whole."""
    gone = checkpoint.with_suffix(".partial")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _check_visible(directory: Path) -> None:
    """Raise OSError on all ranks when one does not see the directory that rank 0 has made."""
    deadline = time.monotonic() + _VISIBLE_S
    while not (seen := directory.is_dir()) and time.monotonic() < deadline:
        time.sleep(0.5)
    ranks: list[bool] = [seen]
    if dist.is_initialized():
        ranks = [False] * dist.get_world_size()
        dist.all_gather_object(ranks, seen)
    blind = [number for number, seen in enumerate(ranks) if not seen]
    if blind:
        raise OSError(
            f"{directory} is not seen by {len(blind)} of {len(ranks)} ranks (the first: {blind[0]}): put `output` on a "
            "file system that all nodes share"
        )

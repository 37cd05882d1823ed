"""Buckets of weights written as a Hugging Face checkpoint that servers on the same file system load."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from real_megatron.hf.checkpoint import INDEX
from real_megatron.hf.side_files import carry
from real_megatron.rollout.engine import WeightSyncError
from real_megatron.rollout.remote.buckets import WeightBucket

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointSpool:
    """One complete checkpoint at a time in `directory/<label>`, and the one being written next to it.

    The old one is deleted only when `discard_others` is called, after the servers have loaded the new one. Every write
    error becomes one WeightSyncError about the disk and leaves no partial checkpoint behind.
    """

    def __init__(self, directory: Path, model_dir: Path) -> None:
        """model_dir: where config.json, the tokenizer and the like are copied from."""
        self._root = directory
        self._model_dir = model_dir
        self._partial = directory / "none"
        self._weight_map: dict[str, str] = {}
        self.finished: Path | None = None
        """The last complete checkpoint."""

    def open(self, label: str) -> None:
        self._partial = self._root / f"{label}.partial"
        self._weight_map = {}
        with self._disk_errors():
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            carry(self._model_dir, self._partial)

    def add(self, bucket: WeightBucket) -> None:
        name = f"model-{len(set(self._weight_map.values())):05d}.safetensors"
        tensors = dict(bucket.to_host().tensors())
        with self._disk_errors():
            save_file(tensors, self._partial / name, {"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, name)

    def finish(self, label: str) -> Path:
        target = self._root / label
        with self._disk_errors():
            index = {"metadata": {}, "weight_map": self._weight_map}
            (self._partial / INDEX).write_text(json.dumps(index), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            self._partial.rename(target)
        self.finished = target
        return target

    def discard_others(self) -> None:
        for old in self._root.iterdir():
            if old != self.finished and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            # safetensors wraps the operating system's error in its own.
            codes = {getattr(error, "errno", None)} | {c for c in _NO_SPACE if f"os error {c}" in str(error)}
            full = not codes.isdisjoint(_NO_SPACE)
            raise WeightSyncError(
                f"weight sync by disk: {'no space left for' if full else 'cannot write'} {self._partial}: {error}; "
                "free space there, or choose another rollout.weight_sync"
            ) from error

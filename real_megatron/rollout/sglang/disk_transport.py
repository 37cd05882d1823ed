"""Weights by a checkpoint directory on a disk that the servers can read."""

import asyncio
import errno
import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from real_megatron.rollout.remote.buckets import Bucket
from real_megatron.rollout.remote.errors import WeightSyncError
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.transport import Flight, Transport


class DiskTransport(Transport):
    """`/update_weights_from_disk`: a checkpoint directory that all servers can read.

    Servers are touched only when it is complete; the one before is kept until then, older ones are deleted.
    """

    def __init__(self, control: Control, directory: Path, model_dir: Path) -> None:
        """model_dir: where config.json, the tokenizer and the like are copied from."""
        super().__init__(control)
        self._root = directory
        self._model_dir = model_dir
        self._partial: Path | None = None
        self._finished: Path | None = None
        self._index: dict[str, str] = {}

    async def open(self, flight: Flight, version: str) -> None:
        self._partial = self._root / f"{version}.partial"
        self._index = {}
        with _disk_errors(self._partial):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            for source in self._model_dir.iterdir():
                if source.is_file() and source.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
                    if not source.name.endswith(".index.json"):
                        shutil.copy(source, self._partial)

    async def send(self, flight: Flight, bucket: Bucket) -> None:
        name = f"model-{len(set(self._index.values())):05d}.safetensors"
        path = self._partial / name
        tensors = dict(bucket.to_host().tensors())
        with _disk_errors(self._partial):
            await asyncio.to_thread(save_file, tensors, path, {"format": "pt"})
        self._index |= dict.fromkeys(tensors, name)

    async def finish(self, flight: Flight, version: str) -> None:
        target = self._root / version
        with _disk_errors(self._partial):
            index = {"metadata": {}, "weight_map": self._index}
            (self._partial / "model.safetensors.index.json").write_text(json.dumps(index))
            shutil.rmtree(target, ignore_errors=True)
            self._partial.rename(target)

        self._finished = target
        await flight.each(lambda replica: self._load(replica, version))
        for old in self._root.iterdir():
            if old != target and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)

    async def restore(self, replica: Replica, version: str) -> bool:
        if self._finished is None or self._finished.name != version:
            return False
        await self._load(replica, version)
        return True

    async def _load(self, replica: Replica, version: str) -> None:
        await self.control.quiesce(replica, version)
        body = {"model_path": str(self._finished), "flush_cache": True}
        await self.control.post(replica, "/update_weights_from_disk", body)


class _disk_errors:
    """Turns an OSError into one message about the disk, and leaves no partial checkpoint behind."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        # safetensors may wrap the operating system's error in its own.
        if not isinstance(error, (OSError, SafetensorError)):
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = "no space for" if full else "cannot write"
        raise WeightSyncError(
            f"weight sync by disk: {what} {self._partial}: {error}; free space there, or choose another "
            "rollout.weight_sync"
        ) from error

"""Weights by a checkpoint directory on a disk that the servers can read."""

import asyncio
from pathlib import Path

from real_megatron.rollout.remote.buckets import WeightBucket
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.remote.spool import CheckpointSpool
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.transport import SyncTargets, Transport


class DiskTransport(Transport):
    """`/update_weights_from_disk`. Servers are touched only when the checkpoint is complete; it stays for servers
    that come back later."""

    def __init__(self, control: Control, spool: CheckpointSpool) -> None:
        super().__init__(control)
        self._spool = spool

    async def open(self, targets: SyncTargets, label: str) -> None:
        self._spool.open(label)

    async def send(self, targets: SyncTargets, bucket: WeightBucket) -> None:
        await asyncio.to_thread(self._spool.add, bucket)

    async def finish(self, targets: SyncTargets, label: str) -> None:
        path = self._spool.finish(label)
        await targets.each(lambda replica: self._load(replica, path, label))
        self._spool.discard_others()

    async def restore(self, replica: Replica, label: str) -> bool:
        path = self._spool.finished
        if path is None or path.name != label:
            return False
        await self._load(replica, path, label)
        return True

    async def _load(self, replica: Replica, path: Path, label: str) -> None:
        await self.control.quiesce(replica, label)
        body = {"model_path": str(path), "flush_cache": True}
        await self.control.post(replica, "/update_weights_from_disk", body, self.control.timeout_s)

"""Weights by shared memory: CUDA IPC handles, or shared memory files on a CPU."""

import base64
import io
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import torch

from real_megatron.rollout.remote.buckets import WeightBucket
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.transport import SyncTargets, Transport


class TensorTransport(Transport):
    """`/update_weights_from_tensor`: the server maps the bucket's memory: CUDA IPC, or shared memory on a CPU.

    Server and trainer run on one host; the trainer's GPU has the same index in the server's process.
    """

    async def open(self, targets: SyncTargets, label: str) -> None:
        async def one(replica: Replica) -> None:
            await self.control.quiesce(replica, label)
            await self.control.begin(replica)

        await targets.each(one)

    async def send(self, targets: SyncTargets, bucket: WeightBucket) -> None:
        # Sharing host memory moves it: of what is pinned, and used again, a copy goes.
        shared = replace(bucket, flat=bucket.flat.clone()) if bucket.flat.is_pinned() else bucket

        async def one(replica: Replica) -> None:
            # One entry per tensor-parallel rank; each takes its shard of the whole tensor. A handle counts one reader,
            # so every reader has its own.
            payloads = [_pickle_by_handle(shared) for _ in range(await self.control.tensor_parallel(replica))]
            body = {"serialized_named_tensors": payloads, "flush_cache": True}
            await self.control.post(replica, "/update_weights_from_tensor", body)

        await targets.each(one)

    async def finish(self, targets: SyncTargets, label: str) -> None:
        await targets.each(self.control.end)


def _pickle_by_handle(bucket: WeightBucket) -> str:
    """Base64 of the pickled [(name, tensor)], tensors as handles of shared memory: the format of SGLang's
    MultiprocessingSerializer."""
    buffer = io.BytesIO()
    strategy = torch.multiprocessing.get_sharing_strategy()
    if not bucket.flat.is_cuda:
        # The other strategy passes file descriptors over a socket that HTTP is not.
        torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        ForkingPickler(buffer).dump(bucket.tensors())
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()

"""Seconds in which new weights reach the servers, by the way that they take in this package.

Every bucket is gathered on rank 0 (`bridge/gathering.py`) and sent by it to all servers at once, each GPU of which
receives all of it; one after the other, bucket by bucket. Meanwhile it is copied to rank 0's host memory
(`rollout.keep_weights`).
"""

import math

from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import DEFAULT, Efficiency
from real_megatron.planning.links import Group, group
from real_megatron.planning.servers import Servers
from real_megatron.planning.shapes import shapes
from real_megatron.planning.workload import Layout

_BUCKET_BYTES = 512 * 2**20  # `rollout.bucket_mib`, and of `export_hf`


def sync_time(layout: Layout, gpu: Gpu, servers: Servers, efficiency: Efficiency = DEFAULT) -> dict[str, float]:
    """Seconds by part of one sync of the whole model in bfloat16."""
    parallel, weights = layout.parallel, shapes(layout.description)
    dense, experts = 2.0 * (weights.total - weights.experts), 2.0 * weights.experts
    size = dense + experts
    tensor = group(gpu, efficiency, 1, parallel.tensor)
    expert = group(gpu, efficiency, parallel.tensor, parallel.expert)
    stages = group(gpu, efficiency, layout.world // parallel.pipeline, parallel.pipeline)
    # A bucket has one owner: the dense part of a stage, or the experts of one of its expert-parallel ranks.
    owners = parallel.pipeline * (1 + (parallel.expert if experts else 0))
    buckets = math.ceil(size / _BUCKET_BYTES) + owners
    # What the first expert-parallel rank and the first stage hold need not go there.
    elsewhere, later = 1 - 1 / parallel.expert, 1 - 1 / parallel.pipeline
    parts = {
        "gathering shards": tensor.gather(size, buckets)
        + expert.send(elsewhere * experts, elsewhere * buckets)
        + stages.send(later * size, later * buckets),
        "tensor by tensor": weights.tensors(layout.description.num_experts) * efficiency.tensor,
        "requests": efficiency.pause + math.ceil(size / _BUCKET_BYTES) * efficiency.bucket,
    }
    if servers.colocated:
        # CUDA IPC: the GPUs of each server read rank 0's memory, each its shard.
        parts["sending to servers"] = servers.count * size / (gpu.nvlink * efficiency.nvlink)
        parts["sleeping and waking"] = efficiency.wake
    else:
        inside = layout.world + servers.gpus <= gpu.per_node
        receivers = Group(gpu, efficiency, 1 + servers.gpus, 1 + servers.gpus if inside else 1)
        parts["sending to servers"] = receivers.send(size)
    if servers.keep_weights:
        beyond = size / efficiency.host_copy - parts["sending to servers"]
        parts["copy to host memory, beyond sending"] = max(0.0, beyond)
    return parts

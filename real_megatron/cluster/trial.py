"""Times an all-reduce and a broadcast over all training ranks, under torchrun as a run would start; rank 0 prints JSON.

python -m torch.distributed.run … -m real_megatron.cluster.trial
"""

import json
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from real_megatron.cluster.checks import MARK
from real_megatron.runtime import default_device, start_process_group

TIMEOUT_MINUTES = 2


def seconds(action: Callable[[], object], times: int) -> float:
    """The shortest of some calls, after one that forms connections. Collective."""
    action()
    best = float("inf")
    for _ in range(times):
        dist.barrier()
        begin = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best


def main() -> None:
    start_process_group(TIMEOUT_MINUTES)
    on_gpu = torch.cuda.is_available()
    size, times = (256 * 2**20, 5) if on_gpu else (8 * 2**20, 3)
    data = torch.ones(size // 4, device=default_device())
    found = {
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "gpu": torch.cuda.get_device_name() if on_gpu else "",
        "bytes": size,
        "all_reduce": seconds(lambda: dist.all_reduce(data), times),
        "broadcast": seconds(lambda: dist.broadcast(data, src=0), times),
    }
    if dist.get_rank() == 0:
        print(MARK + json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

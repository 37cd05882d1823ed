"""Gathers and reduce-scatters of uneven shards, which Megatron-Core's expert dispatch needs and gloo lacks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor


def install() -> None:
    """Replace Megatron-Core's two functions where ranks hold different numbers of rows; equal numbers stay with it."""
    mappings._gather_along_first_dim = _with_uneven(mappings._gather_along_first_dim, gather)
    mappings._reduce_scatter_along_first_dim = _with_uneven(mappings._reduce_scatter_along_first_dim, reduce_scatter)


def _with_uneven(even: Callable[..., Tensor], uneven: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def collective(
        x: Tensor, group: dist.ProcessGroup, sizes: Sequence[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if sizes is None or group.size() == 1:
            return even(x, group, sizes, use_global_buffer)
        return uneven(x, group, [int(size) for size in sizes])

    return collective


def gather(x: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Concatenate the ranks' `[sizes[rank], …]` along the first axis: `[sum(sizes), …]`."""
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: x.size(0)] = x
    shards = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(shards, padded, group=group)
    return torch.cat([shard[:size] for shard, size in zip(shards, sizes, strict=True)])


def reduce_scatter(x: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """Sum the ranks' `[sum(sizes), …]`; each keeps its own rows, `[sizes[rank], …]`."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total.split(list(sizes))[group.rank()].contiguous()

"""Attention under a `SegmentTree` through torch's flex_attention: the implementation for GPUs, with torch alone."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from real_megatron.batch.segments import SegmentTree
from real_megatron.batch.shards import TokenShard
from real_megatron.policy.block_mask import block_mask

RECOMPILE_LIMIT = 64
"""Gradients on or off, a window, lengths up to a block: each compiles anew. Beyond the limit torch would silently run
uncompiled, with a dense T × T matrix; as one whole graph that is an error."""


def flex_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: SegmentTree,
    scale: float,
    window: int | None = None,
    shard: TokenShard | None = None,
) -> Tensor:
    """The same function as `segment_attention`, as one block-sparse kernel.

    query `[T of the shard, heads, d]` (without a shard: all T), key and value `[T, kv_heads, d]` → the query's shape.
    On CUDA the kernel is compiled once per shape class; on CPU it runs uncompiled, for tests.
    """
    mask = _mask(tree, window, shard, query.device)
    attend: Callable[..., Any] = flex_attention
    if query.is_cuda:
        attend = _compiled
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out: Tensor = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=query.size(1) > key.size(1))
    return out[0].transpose(0, 1)


def _compiled(*args: Any, **kwargs: Any) -> Any:
    # Each thread has its own limit, and where activations are recomputed autograd's calls this.
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
        return _kernel()(*args, **kwargs)


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., Any]:
    # Here, and not in torch's pool of processes: a signal to the process group would end that, and the step under way
    # would wait for it should it meet new shapes.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, options={"compile_threads": 1})


@lru_cache(maxsize=16)
def _mask(tree: SegmentTree, window: int | None, shard: TokenShard | None, device: torch.device) -> BlockMask:
    """The mask that all layers of a micro-batch share (one per window size); kept for its backward pass."""
    ends, position = tree.subtree_ends().to(device), tree.positions().to(device)
    # A tensor also without a shard, where it counts: the compiled kernel is one.
    token = (torch.arange(tree.total) if shard is None else shard.index()).to(device)
    q_position = position[token]

    # As a tensor: a captured Python number becomes a symbol of the compiled kernel.
    limit = None if window is None else torch.tensor(window, device=device)

    def admits(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        admitted = (k <= token[q]) & (token[q] < ends[k])
        return admitted if limit is None else admitted & (q_position[q] - position[k] < limit)

    return block_mask(admits, token.numel(), tree.total, device)

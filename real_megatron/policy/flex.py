"""Attention under a `Layout` through torch's flex_attention: the form for GPUs, with torch alone."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from real_megatron.batch.layout import Layout
from real_megatron.batch.shares import Share
from real_megatron.policy.block_mask import block_mask


def flex_segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None = None,
    share: Share | None = None,
) -> Tensor:
    """The same function as `segment_attention`, as one block-sparse kernel.

    query `[T of the share, heads, d]` (without a share: all T), key and value `[T, kv_heads, d]` → the query's shape.
    On CUDA the kernel is compiled once per shape class; on CPU it runs uncompiled, for tests.
    """
    mask = _mask(layout, window, share, query.device)
    attend = _compiled() if query.is_cuda else flex_attention
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=query.size(1) > key.size(1))
    return out[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled():
    # Gradients on or off, a window, lengths up to a block: each compiles anew. Beyond the limit torch would quietly run
    # uncompiled, with a dense T × T matrix; with `fullgraph` that is an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@lru_cache(maxsize=16)
def _mask(layout: Layout, window: int | None, share: Share | None, device: torch.device) -> BlockMask:
    """The mask that all layers of a micro-batch share (one per window size); kept for its backward pass."""
    lengths = torch.tensor(layout.lengths)
    segment = torch.repeat_interleave(torch.arange(len(layout.segments)), lengths).to(device)
    parent = torch.tensor([-1 if s.parent is None else s.parent for s in layout.segments])
    parent = torch.repeat_interleave(parent, lengths).to(device)
    position = layout.positions().to(device)
    queries = (torch.arange(layout.total) if share is None else share.index()).to(device)
    q_segment, q_parent, q_position = segment[queries], parent[queries], position[queries]

    # As a tensor: a captured Python number becomes a symbol of the compiled kernel.
    limit = None if window is None else torch.tensor(window, device=device)

    def admits(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (q_segment[q] == segment[k]) & (q_position[q] >= position[k])
        admitted = own | (q_parent[q] == segment[k])
        return admitted if limit is None else admitted & (q_position[q] - position[k] < limit)

    return block_mask(admits, queries.numel(), layout.total, device)

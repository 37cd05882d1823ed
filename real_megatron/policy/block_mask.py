"""Block masks for flex_attention without the dense mask, whose T² entries outgrow a GPU before the tokens do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""flex_attention's own default block size, of queries and of keys."""
CHUNK_BYTES = 64 * 2**20
"""The mask is evaluated in chunks of rows of about so many entries (one byte each)."""


def block_mask(
    admits: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], queries: int, keys: int, device: torch.device
) -> BlockMask:
    """What `create_block_mask(admits, None, None, queries, keys, device)` gives, in memory linear in `keys`.

    Each block of the mask is empty (skipped), full (`admits` is not asked again) or partial.
    """
    key_blocks = -(-keys // BLOCK)
    chunk = max(1, CHUNK_BYTES // (key_blocks * BLOCK * BLOCK)) * BLOCK
    zero = torch.zeros((), dtype=torch.int64, device=device)
    key_index = torch.arange(keys, device=device)
    counts = []
    for first in range(0, queries, chunk):
        query_index = torch.arange(first, min(first + chunk, queries), device=device)
        mask = admits(zero, zero, query_index[:, None], key_index[None, :])
        mask = F.pad(mask, (0, -keys % BLOCK, 0, -query_index.numel() % BLOCK))
        counts.append(mask.view(-1, BLOCK, key_blocks, BLOCK).sum((1, 3), dtype=torch.int32))
    count = torch.cat(counts)
    full = count == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_ordered((count > 0) & ~full), *_ordered(full), BLOCK, mask_mod=admits, seq_lengths=(queries, keys)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of blocks, int32: how many are set `[1, 1, rows]`; all columns, those first `[1, 1, rows, columns]`."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]

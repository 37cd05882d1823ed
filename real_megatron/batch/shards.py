"""Which tokens of a micro-batch each context-parallel rank runs."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from real_megatron.batch.balance import longest_first

BLOCK = 128
"""Most consecutive tokens that are assigned together: flex_attention's block of queries, which then are contiguous."""
MIN_BLOCKS = 4
"""In short micro-batches blocks are smaller, so that each rank gets at least so many (or single tokens)."""


@dataclass(frozen=True)
class TokenShard:
    """The tokens of one context-parallel rank: ascending ranges (first, one past the last) of the packing order."""

    ranges: tuple[tuple[int, int], ...]

    def index(self) -> Tensor:
        """Packing index of each token of the shard, int64 `[total]`."""
        return torch.cat([torch.arange(first, end) for first, end in self.ranges])

    def cut(self, starts: Sequence[int]) -> list[tuple[int, int, int]]:
        """The shard's ranges, cut where parts of the packing order begin: (part, first, one past the last), in order.

        starts: the first token of each part, ascending from 0
        """
        found = []
        for first, end in self.ranges:
            part = bisect_right(starts, first) - 1
            while first < end:
                stop = min(end, starts[part + 1]) if part + 1 < len(starts) else end
                found.append((part, first, stop))
                first, part = stop, part + 1
        return found


def shard_tokens(costs: Tensor, ranks: int) -> tuple[TokenShard, ...]:
    """Distribute a micro-batch's tokens over `ranks` ranks: as many tokens for each, and even costs.

    costs: what each token takes to run beyond what every token takes, `[T]` (attention grows along a sequence). Blocks
    of consecutive tokens are assigned by longest processing time first, as `balance` assigns groups; the fewer than
    `BLOCK · ranks` tokens at the end that do not fill a block for each rank are distributed evenly. Raises ValueError
    when T is not a multiple of `ranks`. Deterministic, so that all ranks find the same shards.
    """
    total = costs.numel()
    if total % ranks:
        raise ValueError(f"{total} tokens do not divide into {ranks} equal shards: pad them to a multiple")
    each = total // ranks
    size = min(BLOCK, max(1, each // MIN_BLOCKS))
    count = each // size
    body, rest = count * size * ranks, each - count * size
    loads = costs[:body].double().view(-1, size).sum(1).tolist()
    shards = []
    for rank, blocks in enumerate(longest_first(loads, ranks, capacity=count)):
        ranges = [(block * size, (block + 1) * size) for block in sorted(blocks)]
        if rest:
            ranges.append((body + rank * rest, body + (rank + 1) * rest))
        shards.append(TokenShard(_joined(ranges)))
    return tuple(shards)


def _joined(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same ranges with adjacent ones made one."""
    joined = [ranges[0]]
    for first, end in ranges[1:]:
        if first == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return tuple(joined)

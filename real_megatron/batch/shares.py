"""Which tokens of a micro-batch each context-parallel rank runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from real_megatron.batch.balance import longest_first
from real_megatron.batch.layout import Layout

CHUNK = 128
"""Most tokens that are dealt as one: flex_attention's block, so that a rank's blocks of queries are contiguous."""
MIN_CHUNKS = 4
"""Short micro-batches are cut finer, into at least so many chunks a rank (or single tokens)."""


@dataclass(frozen=True)
class Share:
    """The tokens of one context-parallel rank: ascending runs (first, one past the last) of the packing order."""

    runs: tuple[tuple[int, int], ...]

    def index(self) -> Tensor:
        """Packing index of each token of the share, int64 `[total]`."""
        return torch.cat([torch.arange(first, end) for first, end in self.runs])

    def pieces(self, layout: Layout) -> list[tuple[int, int, int]]:
        """The share as (segment, first, one past the last) with tokens counted within the segment, in order."""
        ends = list(accumulate(layout.lengths))
        pieces = []
        for first, end in self.runs:
            for i, (segment, stop) in enumerate(zip(layout.segments, ends, strict=True)):
                start = stop - segment.length
                if max(first, start) < min(end, stop):
                    pieces.append((i, max(first, start) - start, min(end, stop) - start))
        return pieces


def share_out(costs: Tensor, ranks: int) -> tuple[Share, ...]:
    """Deal a micro-batch's tokens to `ranks` ranks: as many tokens for each, and even costs.

    costs: what each token takes to run beyond what every token takes, `[T]` (attention grows along a sequence). Chunks
    of consecutive tokens are dealt by longest processing time first, as `balance` deals groups; the fewer than
    `CHUNK · ranks` tokens at the end that fill no chunk each are cut evenly. Raises ValueError when T is not a multiple
    of `ranks`. Deterministic, so that all ranks find the same shares.
    """
    total = costs.numel()
    if total % ranks:
        raise ValueError(f"{total} tokens do not divide into {ranks} equal shares: pad them to a multiple")
    each = total // ranks
    size = min(CHUNK, max(1, each // MIN_CHUNKS))
    count = each // size
    body, rest = count * size * ranks, each - count * size
    loads = costs[:body].double().view(-1, size).sum(1).tolist()
    shares = []
    for rank, chunks in enumerate(longest_first(loads, ranks, capacity=count)):
        runs = [(chunk * size, (chunk + 1) * size) for chunk in sorted(chunks)]
        if rest:
            runs.append((body + rank * rest, body + (rank + 1) * rest))
        shares.append(Share(_joined(runs)))
    return tuple(shares)


def _joined(runs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined = [runs[0]]
    for first, end in runs[1:]:
        if first == joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((first, end))
    return tuple(joined)

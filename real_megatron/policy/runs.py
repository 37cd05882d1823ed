"""Which consecutive tokens of a micro-batch share one call of attention, and which keys and mask each call takes.

A call for every segment would be exact, but a branch of a response has a token or two, and a call costs as much as
thousands of pairs of a query and a key. So a run is a segment with the small subtrees that follow it, under a dense
mask. Segments are in depth-first order: what a run's tokens continue is the run itself and what its first segment
continues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from real_megatron.batch.segments import SegmentTree
from real_megatron.batch.shards import TokenShard

CALL = 1_000_000
"""What a call costs beside its pairs, forward and backward, in pairs times the width of all query heads: from 0.25 to
0.35 ms on a core that has 0.135 µs for a pair of 512 elements, 0.58 µs for one of 2048."""
PAIR = 64
"""What a pair costs beside its elements, in elements: 0.04 µs for 64 elements."""
KEY = 8
"""What a key costs beside its pairs, in pairs: it is copied, and its gradient is added to that of other runs. Measured:
7 to 30, the fewer the more query heads share it."""


@dataclass(frozen=True, eq=False)
class Run:
    """One call of attention."""

    first: int
    end: int
    """The queries: these tokens in packing order."""
    pieces: tuple[tuple[int, int], ...]
    """The keys: of each of these pieces of `Runs.lengths` the first so many tokens."""
    mask: Tensor | None
    """Which query attends to which key, bool `[queries, keys]`; None where it is the causal mask of equally many."""

    @property
    def keys(self) -> int:
        """How many keys the call takes."""
        return sum(length for _, length in self.pieces)


@dataclass(frozen=True, eq=False)
class Runs:
    """All calls of a micro-batch, or of one context-parallel rank's tokens, in packing order."""

    lengths: list[int]
    """All tokens of the micro-batch in consecutive pieces, of which runs take their keys."""
    runs: list[Run]


@lru_cache(maxsize=4)
def runs_of(tree: SegmentTree, width: int, window: int | None, shard: TokenShard | None, device: torch.device) -> Runs:
    """The runs that all layers of a micro-batch share.

    width: of all query heads together, which decides how much a pair costs beside a call
    window, shard: as in `segment_attention`
    """
    spans = _spans(tree, CALL // (width + PAIR))
    continued = [_joined(tree, index) for index, _, _ in spans]
    bounds = {bound for ranges in continued for part in ranges for bound in part}
    bounds |= {0, tree.total, *(first for _, first, _ in spans)}
    pieces = list(pairwise(sorted(bounds)))
    place = {start: i for i, (start, _) in enumerate(pieces)}
    asked = TokenShard(((0, tree.total),)) if shard is None else shard
    ends, position = tree.subtree_ends().to(device), tree.positions().to(device)
    runs = []
    for i, first, end in asked.cut([start for _, start, _ in spans]):
        ranges = [*continued[i], (spans[i][1], end)]
        taken = []
        for start, stop in ranges:
            for j in range(place[start], len(pieces)):
                if pieces[j][0] >= stop:
                    break
                taken.append((j, min(pieces[j][1], stop) - pieces[j][0]))
        mask = _mask(ranges, first, end, ends, position, window)
        runs.append(Run(first, end, tuple(taken), mask))
    return Runs([end - start for start, end in pieces], runs)


def _spans(tree: SegmentTree, call: int) -> list[tuple[int, int, int]]:
    """The tokens of each run: (its first segment, first token, one past the last).

    A segment joins the run before it where that costs no more pairs than a run of its own. call: what a call costs
    beside its pairs and keys, in pairs
    """
    spans: list[tuple[int, int, int]] = []
    spent = 0
    for i, (segment, start, offset) in enumerate(zip(tree.segments, tree.starts, tree.offsets, strict=True)):
        if not segment.length:
            continue
        stop, keys = start + segment.length, offset + segment.length
        # A causal mask's kernel leaves out about half of the pairs.
        apart = call + (KEY + segment.length) * keys - (0 if offset else segment.length**2 // 2)
        if spans:
            index, first, _ = spans[-1]
            together = call + (KEY + stop - first) * (tree.offsets[index] + stop - first)
            if together <= spent + apart:
                spans[-1], spent = (index, first, stop), together
                continue
        spans.append((i, start, stop))
        spent = apart
    return spans


def _joined(tree: SegmentTree, index: int) -> list[tuple[int, int]]:
    """The tokens that a segment continues, as ranges of the packing order; adjacent ones apart."""
    ranges = [(tree.starts[i], tree.starts[i] + tree.segments[i].length) for i in tree.ancestors(index)]
    return [(start, end) for start, end in ranges if start < end]


def _mask(
    ranges: Sequence[tuple[int, int]], first: int, end: int, ends: Tensor, position: Tensor, window: int | None
) -> Tensor | None:
    """The mask of the queries first … end - 1 and the keys of `ranges`; None for the causal mask of one sequence."""
    keys = torch.cat([torch.arange(*part, device=ends.device) for part in ranges])
    queries = torch.arange(first, end, device=ends.device)
    if keys.numel() == end - first and (window is None or window >= end - first) and bool((ends[keys] >= end).all()):
        return None
    mask = (keys <= queries[:, None]) & (queries[:, None] < ends[keys])
    return mask if window is None else mask & (position[queries][:, None] - position[keys] < window)

"""Random segment trees for tests, and what their tokens attend to, by the definition."""

import random

import torch
from torch import Tensor

from real_megatron.batch.segments import Segment, SegmentTree

LENGTHS = (0, 1, 1, 2, 5, 90, 140)
"""Empty segments, branches that share a call of attention, and segments that take one each."""


def random_tree(seed: int, segments: int = 14, depth: int = 5, multiple: int = 1) -> SegmentTree:
    """Segments in depth-first order, at most `depth` below the beginning of a sequence; padded to a multiple."""
    rng = random.Random(seed)
    path: list[int] = []
    found: list[Segment] = []
    for i in range(segments):
        # Often deeper, sometimes a new sequence.
        kept = rng.choice((len(path), len(path), rng.randint(0, len(path))))
        path = path[: min(kept, depth)]
        found.append(Segment(rng.choice(LENGTHS), path[-1] if path else None))
        path.append(i)
    total = sum(segment.length for segment in found)
    return SegmentTree((*found, Segment(-total % multiple or multiple)))


def sequences(tree: SegmentTree) -> list[list[int]]:
    """Per token of the micro-batch the tokens of its sequence up to and with it: what it attends to."""
    whole: list[list[int]] = []
    found: list[list[int]] = []
    for segment in tree.segments:
        sequence = [] if segment.parent is None else whole[segment.parent]
        for _ in range(segment.length):
            sequence = [*sequence, len(found)]
            found.append(sequence)
        whole.append(sequence)
    return found


def dense_mask(tree: SegmentTree, window: int | None = None) -> Tensor:
    """The mask of `sequences`, of which a window keeps the last tokens; bool `[total, total]`."""
    mask = torch.zeros(tree.total, tree.total, dtype=torch.bool)
    for token, seen in enumerate(sequences(tree)):
        mask[token, seen if window is None else seen[-window:]] = True
    return mask

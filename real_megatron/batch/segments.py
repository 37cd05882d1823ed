"""Where the sequences of a packed micro-batch begin and end, and which attends to which."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens: a whole sequence, or a part that others continue or that continues another, such as a shared
    prompt, a response to it, and a branch of the response that scores are read on."""

    length: int
    parent: int | None = None
    """Index of the segment that this one continues; None for the beginning of a sequence."""


@dataclass(frozen=True)
class SegmentTree:
    """The segments of a micro-batch in packing order, with the segment that each continues.

    A token attends to the tokens before it in its own segment, and to all tokens of the segments that this one
    continues: its parent, the parent's parent, and so on. Positions count along that path.

    A segment comes directly behind its parent's tokens or behind another whole subtree of its parent (depth-first
    order). So a segment and all that continue it are consecutive tokens, and a token attends to those before it whose
    subtree has not ended.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        path: list[int] = []
        for i, segment in enumerate(self.segments):
            if segment.parent is not None and not 0 <= segment.parent < i:
                raise ValueError(f"segment {i}: its parent {segment.parent} must come before it")
            while path and path[-1] != segment.parent:
                path.pop()
            if segment.parent is not None and not path:
                raise ValueError(f"segment {i}: between its parent {segment.parent} and it stands another sequence")
            path.append(i)

    @property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    @property
    def total(self) -> int:
        """Tokens in the micro-batch."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> list[int]:
        """Where each segment's tokens begin in the micro-batch."""
        return list(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def offsets(self) -> list[int]:
        """Position of each segment's first token in its sequence: the tokens of all segments that it continues."""
        offsets: list[int] = []
        for segment in self.segments:
            parent = segment.parent
            offsets.append(0 if parent is None else offsets[parent] + self.segments[parent].length)
        return offsets

    @cached_property
    def ends(self) -> list[int]:
        """Where each segment's subtree ends: one past the last token of it and of all segments that continue it."""
        ends = [start + segment.length for start, segment in zip(self.starts, self.segments, strict=True)]
        for i in reversed(range(len(ends))):
            parent = self.segments[i].parent
            if parent is not None:
                ends[parent] = max(ends[parent], ends[i])
        return ends

    def ancestors(self, index: int) -> list[int]:
        """The segments that segment `index` continues, the beginning of the sequence first."""
        found: list[int] = []
        parent = self.segments[index].parent
        while parent is not None:
            found.append(parent)
            parent = self.segments[parent].parent
        return found[::-1]

    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 `[total]`."""
        if not self.segments:
            return torch.zeros(0, dtype=torch.long)
        return torch.cat(
            [torch.arange(s.length) + offset for s, offset in zip(self.segments, self.offsets, strict=True)]
        )

    def subtree_ends(self) -> Tensor:
        """Per token, where the subtree of its segment ends, int64 `[total]`. Token q attends to token k where
        k ≤ q < subtree_ends[k]."""
        return torch.repeat_interleave(torch.tensor(self.ends, dtype=torch.long), torch.tensor(self.lengths))

    def attention_pairs(self, window: int | None = None) -> int:
        """Number of (query, key) pairs under the mask; `window` as in `mask`."""
        pairs = 0
        for segment, offset in zip(self.segments, self.offsets, strict=True):
            # Token t of the segment sees offset + t + 1 tokens, up to the window.
            length = segment.length
            growing = length if window is None else min(max(window - offset, 0), length)
            pairs += growing * offset + growing * (growing + 1) // 2 + (length - growing) * (window or 0)
        return pairs

    def mask(self, window: int | None = None) -> Tensor:
        """The dense attention mask, bool `[total, total]`, True = attend. `window` keys (self included) at most.

        The definition that attention kernels are tested against; quadratic, so not for long batches.
        """
        position = self.positions()
        segment = torch.repeat_interleave(torch.arange(len(self.segments)), torch.tensor(self.lengths))
        continues = torch.zeros(len(self.segments), len(self.segments), dtype=torch.bool)
        for i in range(len(self.segments)):
            continues[i, self.ancestors(i)] = True
        own = (segment[:, None] == segment[None, :]) & (position[:, None] >= position[None, :])
        mask = own | continues[segment[:, None], segment[None, :]]
        if window is not None:
            mask &= position[:, None] - position[None, :] < window
        return mask

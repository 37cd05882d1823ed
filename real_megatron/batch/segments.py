"""Where the sequences of a packed micro-batch begin and end, and which attends to which."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens: a whole sequence, a shared prompt, or a response that continues a shared prompt."""

    length: int
    parent: int | None = None
    """Index of the prompt segment that this response continues; None for a sequence of its own."""


@dataclass(frozen=True)
class SegmentTree:
    """The segments of a micro-batch in packing order, with the prompt that each response continues.

    A token attends to the tokens before it in its own segment and to all tokens of the segment's parent. Positions
    start at 0, or continue from the parent's length.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for i, segment in enumerate(self.segments):
            if segment.parent is not None and not 0 <= segment.parent < i:
                raise ValueError(f"segment {i}: its parent {segment.parent} must come before it")
            if segment.parent is not None and self.segments[segment.parent].parent is not None:
                raise ValueError(f"segment {i}: its parent {segment.parent} must be a prompt without a parent")

    @property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    @property
    def total(self) -> int:
        """Tokens in the micro-batch."""
        return sum(self.lengths)

    def offset(self, index: int) -> int:
        """Position of the first token of segment `index`: 0, or the parent's length."""
        parent = self.segments[index].parent
        return 0 if parent is None else self.segments[parent].length

    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 `[total]`."""
        if not self.segments:
            return torch.zeros(0, dtype=torch.long)
        return torch.cat([torch.arange(s.length) + self.offset(i) for i, s in enumerate(self.segments)])

    def attention_pairs(self, window: int | None = None) -> int:
        """Number of (query, key) pairs under the mask; `window` as in `mask`."""
        pairs = 0
        for i, segment in enumerate(self.segments):
            # Token t of the segment sees offset + t + 1 tokens, up to the window.
            offset, length = self.offset(i), segment.length
            growing = length if window is None else min(max(window - offset, 0), length)
            pairs += growing * offset + growing * (growing + 1) // 2 + (length - growing) * (window or 0)
        return pairs

    def mask(self, window: int | None = None) -> Tensor:
        """The dense attention mask, bool `[total, total]`, True = attend. `window` keys (self included) at most.

        The definition that attention kernels are tested against; quadratic, so not for long batches.
        """
        index = torch.repeat_interleave(torch.arange(len(self.segments)), torch.tensor(self.lengths))
        parent = torch.tensor([-1 if s.parent is None else s.parent for s in self.segments])[index]
        position = self.positions()
        own = (index[:, None] == index[None, :]) & (position[:, None] >= position[None, :])
        mask = own | (parent[:, None] == index[None, :])
        if window is not None:
            mask &= position[:, None] - position[None, :] < window
        return mask

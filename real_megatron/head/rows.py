"""The vocabulary ids that each packed row asks for, in compressed sparse row (CSR) form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GatherRows:
    """Row `r` asks for the log-probabilities of `ids[offsets[r]:offsets[r + 1]]`; a row may ask for none.

    ids: int64 [nnz], global vocabulary ids, in any order, repeats allowed.
    offsets: int64 [R + 1], ascending from 0 to nnz.
    Checked when built: ValueError names what is wrong. Build on the host and move with `.to(device)`: building from
    device tensors waits for the device once.
    """

    ids: Tensor
    offsets: Tensor
    id_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("ids", "offsets"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int64 or tensor.dim() != 1:
                raise ValueError(
                    f"GatherRows.{name} must be a 1-D int64 tensor, got {tensor.dtype} {list(tensor.shape)}"
                )
        if self.ids.device != self.offsets.device:
            raise ValueError(f"GatherRows: ids on {self.ids.device}, offsets on {self.offsets.device}: use one device")
        if self.offsets.numel() == 0:
            raise ValueError("GatherRows.offsets must have R + 1 entries, so at least one")
        if self.id_range is not None:
            return
        first, last = int(self.offsets[0]), int(self.offsets[-1])
        if first != 0 or last != self.nnz or bool((self.offsets.diff() < 0).any()):
            raise ValueError(f"GatherRows.offsets must ascend from 0 to len(ids) = {self.nnz}, got {first} … {last}")
        low, high = (int(x) for x in self.ids.aminmax()) if self.nnz else (0, -1)
        object.__setattr__(self, "id_range", (low, high))

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> GatherRows:
        """One list of ids a row."""
        rows = [list(row) for row in lists]
        lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
        return cls(torch.tensor([i for row in rows for i in row], dtype=torch.int64), lengths.cumsum(0))

    @classmethod
    def one_per_row(cls, ids: Tensor) -> GatherRows:
        """Row `r` asks for `ids[r]` alone: the chosen token of each chain-of-thought position."""
        return cls(ids, torch.arange(ids.numel() + 1, dtype=torch.int64, device=ids.device))

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1

    @property
    def nnz(self) -> int:
        return self.ids.numel()

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @cached_property
    def row_index(self) -> Tensor:
        """int64 [nnz]: the row that each entry of `ids` belongs to."""
        rows = torch.arange(self.num_rows, device=self.device)
        return rows.repeat_interleave(self.offsets.diff(), output_size=self.nnz)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GatherRows:
        """The same rows on another device, not checked again."""
        ids, offsets = (t.to(device, non_blocking=non_blocking) for t in (self.ids, self.offsets))
        return GatherRows(ids, offsets, self.id_range)

    def slice(self, start: int, end: int) -> GatherRows:
        """Rows `start` to `end`; waits for the device once."""
        first, last = self.offsets[[start, end]].tolist()
        return GatherRows(self.ids[first:last], self.offsets[start : end + 1] - first, self.id_range)

"""How Hugging Face tensors become one Megatron tensor, how tensor parallelism (TP) shards it, and the reverse.

Each transform describes its Megatron tensor as a whole. The shard of one TP rank consists of one or more blocks of that
whole: a distributed checkpoint stores the blocks, a running model holds them concatenated along axis 0. Reading a block
touches only the rows or columns of the Hugging Face tensors that it needs. Values are copied and never computed, so
both directions are bit-identical.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from real_megatron.errors import ConfigError
from real_megatron.hf.checkpoint import Range, Shape

# read(i, rows, columns): that block of the i-th Hugging Face tensor; all columns if None.
Reader = Callable[[int, Range, Range | None], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """A rectangular block of the whole Megatron tensor: index of its first element, and its shape."""

    offset: Shape
    shape: Shape

    def by_rows(self, limit: int) -> list["Block"]:
        """The same block as smaller ones of at most `limit` elements each (but at least one row)."""
        rows = max(1, limit // max(1, prod(self.shape[1:])))
        return [
            Block((self.offset[0] + row, *self.offset[1:]), (min(rows, self.shape[0] - row), *self.shape[1:]))
            for row in range(0, self.shape[0], rows)
        ]

    @property
    def rows(self) -> Range:
        """First row and one past the last."""
        return self.offset[0], self.offset[0] + self.shape[0]


def _shard_bounds(length: int, rank: int, size: int) -> Range:
    """Bounds of `rank`'s shard of an axis; all shards are equally long."""
    if length % size:
        raise ConfigError(f"an axis of length {length} cannot be divided into {size} equal shards")
    return length // size * rank, length // size * (rank + 1)


class Transform(ABC):
    """The whole Megatron tensor (`shape`) and the Hugging Face tensors that it is made of (`hf_shapes`).

    split_axis: the axis that TP shards; None: replicated. hf_starts: the row of the whole at which each Hugging Face
    tensor begins, if each is a range of rows of it; None: they are interleaved.
    """

    shape: Shape
    hf_shapes: tuple[Shape, ...]
    kind: str
    split_axis: int | None = 0
    hf_starts: tuple[int, ...] | None = (0,)

    @abstractmethod
    def blocks(self, rank: int, size: int) -> list[Block]:
        """The blocks of TP rank `rank` of `size`. Raises ConfigError if `size` does not divide the tensor."""

    @abstractmethod
    def read(self, block: Block, read: Reader) -> torch.Tensor:
        """The content of one block, or of some rows of one."""

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The Hugging Face tensors inside the whole Megatron tensor (contiguous; views where possible)."""
        assert self.hf_starts is not None, "a transform that interleaves has a split of its own"
        starts = zip(self.hf_starts, self.hf_shapes, strict=True)
        return [whole[start : start + shape[0]] for start, shape in starts]

    def shard_shape(self, size: int) -> Shape:
        """Shape of one TP rank's tensor in a running model."""
        blocks = self.blocks(0, size)
        return (sum(block.shape[0] for block in blocks), *blocks[0].shape[1:])

    def shard(self, rank: int, size: int, read: Reader) -> torch.Tensor:
        """The tensor that TP rank `rank` of `size` holds in a running model."""
        contents = [self.read(block, read) for block in self.blocks(rank, size)]
        return contents[0] if len(contents) == 1 else torch.cat(contents)

    def merge(self, shards: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        """The whole Megatron tensor from the shards of all TP ranks, in `out` if given."""
        if len(shards) == 1 and out is None:
            return shards[0]
        whole = shards[0].new_empty(self.shape) if out is None else out
        for rank, shard in enumerate(shards):
            start = 0
            for block in self.blocks(rank, len(shards)):
                where = tuple(slice(at, at + length) for at, length in zip(block.offset, block.shape, strict=True))
                whole[where] = shard[start : start + block.shape[0]]
                start += block.shape[0]
        return whole


class Whole(Transform):
    """One tensor, the same on every TP rank."""

    kind = "replicated"
    split_axis = None

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.hf_shapes = (shape,)

    def blocks(self, rank: int, size: int) -> list[Block]:
        return [Block((0,) * len(self.shape), self.shape)]

    def read(self, block: Block, read: Reader) -> torch.Tensor:
        return read(0, block.rows, None)

    def merge(self, shards: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
        return shards[0] if out is None else out.copy_(shards[0])


class Columns(Transform):
    """One tensor whose axis 1, the input of a row-parallel linear layer, is sharded by TP."""

    kind = "row-parallel"
    split_axis = 1

    def __init__(self, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self.hf_shapes = (self.shape,)

    def blocks(self, rank: int, size: int) -> list[Block]:
        start, stop = _shard_bounds(self.shape[1], rank, size)
        return [Block((0, start), (self.shape[0], stop - start))]

    def read(self, block: Block, read: Reader) -> torch.Tensor:
        return read(0, block.rows, (block.offset[1], block.offset[1] + block.shape[1]))


class GateUp(Transform):
    """Gate and up projection of a gated MLP: [gate; up]. Each TP rank holds its shard of both: [gate_r; up_r].

    columns: the width of the input; none for biases.
    """

    kind = "gate + up"

    def __init__(self, width: int, *columns: int) -> None:
        self.width = width
        self.hf_starts = (0, width)
        self.shape = (2 * width, *columns)
        self.hf_shapes = ((width, *columns),) * 2

    def blocks(self, rank: int, size: int) -> list[Block]:
        start, stop = _shard_bounds(self.width, rank, size)
        rest = self.shape[1:]
        return [Block((base + start, *(0,) * len(rest)), (stop - start, *rest)) for base in (0, self.width)]

    def read(self, block: Block, read: Reader) -> torch.Tensor:
        tensor, start = divmod(block.offset[0], self.width)
        return read(tensor, (start, start + block.shape[0]), None)


class Qkv(Transform):
    """Query, key and value projections, interleaved per query group: [q of group 0; k 0; v 0; q of group 1; …].

    With fewer groups than TP ranks a shard ends inside a group, as in Megatron-Core. columns: the width of the input;
    none for biases.
    """

    kind = "q + k + v"
    hf_starts = None

    def __init__(self, heads: int, groups: int, head_dim: int, *columns: int) -> None:
        self.groups, self.q_rows, self.kv_rows = groups, heads // groups * head_dim, head_dim
        self.shape = (groups * (self.q_rows + 2 * self.kv_rows), *columns)
        kv_shape = (groups * self.kv_rows, *columns)
        self.hf_shapes = ((heads * head_dim, *columns), kv_shape, kv_shape)

    def blocks(self, rank: int, size: int) -> list[Block]:
        start, stop = _shard_bounds(self.shape[0], rank, size)
        rest = self.shape[1:]
        return [Block((start, *(0,) * len(rest)), (stop - start, *rest))]

    def read(self, block: Block, read: Reader) -> torch.Tensor:
        contents = []
        at, stop = block.rows
        while at < stop:
            group, row = divmod(at, self.q_rows + 2 * self.kv_rows)
            if row < self.q_rows:
                tensor, rows = 0, self.q_rows
            else:
                tensor, row = divmod(row - self.q_rows, self.kv_rows)
                tensor, rows = tensor + 1, self.kv_rows
            count = min(rows - row, stop - at)
            contents.append(read(tensor, (group * rows + row, group * rows + row + count), None))
            at += count
        return torch.cat(contents)

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        grouped = whole.unflatten(0, (self.groups, -1))
        projections = grouped.split([self.q_rows, self.kv_rows, self.kv_rows], dim=1)
        return [projection.flatten(0, 1).contiguous() for projection in projections]


class Vocabulary(Transform):
    """Embedding or output layer: TP shards the vocabulary, padded with rows of zeros to `padded` rows."""

    kind = "vocabulary"

    def __init__(self, rows: int, columns: int, padded: int | None = None) -> None:
        self.rows = rows
        self.shape = (padded or rows, columns)
        self.hf_shapes = ((rows, columns),)

    def blocks(self, rank: int, size: int) -> list[Block]:
        start, stop = _shard_bounds(self.shape[0], rank, size)
        return [Block((start, 0), (stop - start, self.shape[1]))]

    def read(self, block: Block, read: Reader) -> torch.Tensor:
        start, stop = (min(row, self.rows) for row in block.rows)
        filled = read(0, (start, stop), None)
        missing = block.shape[0] - filled.shape[0]
        return filled if not missing else torch.cat([filled, filled.new_zeros(missing, self.shape[1])])

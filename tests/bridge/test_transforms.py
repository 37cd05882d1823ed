"""Each transform against its definition, at random sizes: sharding, reading, merging and splitting lose no bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from real_megatron.bridge.transforms import Block, Columns, GateUp, Qkv, Transform, Vocabulary, Whole
from real_megatron.errors import ConfigError

SIZES = st.sampled_from([1, 2, 4])
COLUMNS = st.sampled_from([(), (1,), (5,)])


def tensors(transform: Transform) -> list[torch.Tensor]:
    """Distinct values everywhere."""
    start, made = 1, []
    for shape in transform.hf_shapes:
        count = int(torch.Size(shape).numel())
        made.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return made


def reader(hf: list[torch.Tensor]):
    def read(i: int, rows: tuple[int, int], columns: tuple[int, int] | None) -> torch.Tensor:
        block = hf[i][slice(*rows)]
        return block if columns is None else block[:, slice(*columns)]

    return read


def whole_of(transform: Transform, hf: list[torch.Tensor]) -> torch.Tensor:
    """The definition of the whole Megatron tensor, written plainly."""
    if isinstance(transform, GateUp):
        return torch.cat(hf)
    if isinstance(transform, Qkv):
        q, k, v = (t.unflatten(0, (transform.groups, -1)) for t in hf)
        return torch.cat([torch.cat([q[g], k[g], v[g]]) for g in range(transform.groups)])
    if isinstance(transform, Vocabulary):
        return torch.cat([hf[0], torch.zeros(transform.shape[0] - transform.rows, hf[0].size(1), dtype=torch.long)])
    return hf[0]


def shards_of(transform: Transform, whole: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The definition of the TP shards."""
    if transform.split_axis is None:
        return [whole] * size
    if isinstance(transform, GateUp):
        gates, ups = (half.chunk(size) for half in whole.chunk(2))
        return [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    return list(whole.chunk(size, dim=transform.split_axis))


def check(transform: Transform, size: int) -> None:
    hf = tensors(transform)
    whole = whole_of(transform, hf)
    assert transform.shape == tuple(whole.shape)
    expected = shards_of(transform, whole, size)
    shards = [transform.shard(rank, size, reader(hf)) for rank in range(size)]
    for shard, want in zip(shards, expected, strict=True):
        assert torch.equal(shard, want)
        assert transform.shard_shape(size) == tuple(shard.shape)
    assert torch.equal(transform.merge(shards), whole if transform.split_axis is not None else shards[0])
    out = torch.empty_like(whole)
    transform.merge(shards, out=out)
    assert torch.equal(out, whole)
    for tensor, want in zip(transform.split(whole), hf, strict=True):
        assert torch.equal(tensor, want) and tensor.is_contiguous()
    # The blocks of all ranks tile the whole, also when they are divided further by rows.
    tiled = torch.zeros_like(whole)
    for rank in range(size if transform.split_axis is not None else 1):
        for block in transform.blocks(rank, size):
            for rows in block.by_rows(3):
                where = tuple(slice(o, o + n) for o, n in zip(rows.offset, rows.shape, strict=True))
                assert not tiled[where].any() or isinstance(transform, Vocabulary)
                tiled[where] = transform.read(rows, reader(hf))
    assert torch.equal(tiled, whole)


@given(
    size=SIZES,
    groups=st.sampled_from([1, 2, 4, 8]),
    per_group=st.integers(1, 3),
    head=st.sampled_from([2, 4]),
    columns=COLUMNS,
)
@settings(max_examples=60, deadline=None)
def test_qkv(size: int, groups: int, per_group: int, head: int, columns: tuple[int, ...]) -> None:
    transform = Qkv(groups * per_group, groups, head, *columns)
    if transform.shape[0] % size == 0:
        check(transform, size)


@given(size=SIZES, width=st.integers(1, 3), columns=COLUMNS)
@settings(max_examples=30, deadline=None)
def test_gate_up(size: int, width: int, columns: tuple[int, ...]) -> None:
    check(GateUp(4 * width, *columns), size)


@given(size=SIZES, rows=st.integers(1, 21), columns=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_vocabulary_is_padded_with_zeros(size: int, rows: int, columns: int) -> None:
    padded = -(-rows // (2 * size)) * 2 * size
    check(Vocabulary(rows, columns, padded), size)
    # Much padding: whole shards of it.
    check(Vocabulary(rows, columns, padded * 3), size)


@given(size=SIZES, rows=st.integers(1, 4), columns=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_columns_and_whole(size: int, rows: int, columns: int) -> None:
    check(Columns(rows, 4 * columns), size)
    check(Whole(rows, columns), size)
    check(Whole(rows), size)


def test_uneven_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="length 6 cannot be divided into 4"):
        Columns(3, 6).blocks(0, 4)


def test_reading_touches_only_the_rows_it_needs() -> None:
    asked = []

    def read(i: int, rows: tuple[int, int], columns: tuple[int, int] | None) -> torch.Tensor:
        asked.append((i, rows, columns))
        return torch.zeros(rows[1] - rows[0], 5)

    # 4 heads in 2 groups of head width 3: rank 1 of 2 holds the second group.
    Qkv(4, 2, 3, 5).shard(1, 2, read)
    assert asked == [(0, (6, 12), None), (1, (3, 6), None), (2, (3, 6), None)]


def test_blocks_by_rows_respect_the_limit() -> None:
    blocks = Block((2, 1), (5, 4)).by_rows(8)
    assert [(b.offset, b.shape) for b in blocks] == [((2, 1), (2, 4)), ((4, 1), (2, 4)), ((6, 1), (1, 4))]
    assert len(Block((0, 0), (2, 100)).by_rows(8)) == 2, "never less than a row"

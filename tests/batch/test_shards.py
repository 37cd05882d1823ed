"""Context-parallel shards: every token and head row once, equal sizes, even work."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from real_megatron.batch.context import localize
from real_megatron.batch.packing import pack
from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import TokenShard, shard_tokens
from real_megatron.batch.types import Group, Trajectory
from real_megatron.scores import ScoreTree

SCORES = ScoreTree([[[7]], [[8]], [[7, 9]], [[8, 6, 6]]])
"""Branches of two ids and of one: rows ask for different numbers of them."""
GROUPS = [
    Group(
        [1, 2, 3, 4, 5],
        [Trajectory([10, 11, 12, 13], answer_index=3), Trajectory([14, 15], answer_index=None)],
        label=2.0,
    ),
    Group([6, 5], [Trajectory([16, 17, 18], answer_index=1), Trajectory([19], answer_index=0)], label=1.0),
]


@settings(max_examples=100, deadline=None)
@given(each=st.integers(1, 1500), ranks=st.integers(1, 8), seed=st.integers(0, 99))
def test_every_token_is_in_one_shard_and_shards_are_equal(each, ranks, seed):
    costs = torch.rand(each * ranks, generator=torch.Generator().manual_seed(seed))
    indices = [shard.index() for shard in shard_tokens(costs, ranks)]
    assert [index.numel() for index in indices] == [each] * ranks
    assert all((index.diff() > 0).all() for index in indices)
    assert torch.equal(torch.cat(indices).sort().values, torch.arange(each * ranks))


def test_a_causal_sequence_is_distributed_in_a_zigzag():
    """Eight equal blocks of growing cost over two ranks: 7 4 3 0 and 6 5 2 1."""
    assert shard_tokens(torch.arange(64), 2) == (
        TokenShard(((0, 8), (24, 40), (56, 64))),
        TokenShard(((8, 24), (40, 56))),
    )


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="7 tokens do not divide into 2"):
        shard_tokens(torch.ones(7), 2)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_attention_pairs_are_even(ranks):
    """Eight responses of 200 to 1024 tokens behind prompts of 2048 and 900. The busiest rank's fraction of the pairs is
    0.500, 0.251 and 0.125 (CP 2, 4, 8) as distributed, and 0.609, 0.372 and 0.187 for tokens in order."""
    lengths = [200, 1024, 512, 777, 640, 300, 1000, 411]
    segments = [Segment(2048), *(Segment(n, 0) for n in lengths), Segment(900), *(Segment(n, 9) for n in lengths)]
    tree = SegmentTree((*segments, Segment(-sum(s.length for s in segments) % ranks)))
    pairs = tree.positions() + 1
    shards = shard_tokens(pairs, ranks)

    def busiest(indices):
        return max(float(pairs[index].sum()) for index in indices) * ranks / float(pairs.sum())

    distributed = busiest([shard.index() for shard in shards])
    in_order = busiest(torch.arange(tree.total).chunk(ranks))
    assert distributed < 1.01
    assert in_order > 1.2


def test_attention_pairs_of_score_branches_are_even():
    """Two groups of eight responses, each with eleven branches, over 4 ranks. The busiest has 1.03 times its part of
    the mask's pairs; for tokens in order it would have 1.47 times its part."""
    segments: list[Segment] = []
    for prompt in (512, 225):
        root = len(segments)
        segments.append(Segment(prompt))
        for length in (50, 256, 128, 194, 160, 75, 250, 103):
            response = len(segments)
            segments += [Segment(length, root), *(Segment(1 + i % 2, response) for i in range(11))]
    tree = SegmentTree((*segments, Segment(-sum(s.length for s in segments) % 4)))
    pairs = tree.mask().sum(-1)
    loads = [int(pairs[shard.index()].sum()) for shard in shard_tokens(tree.positions() + 1, 4)]
    assert max(loads) * 4 < 1.05 * int(pairs.sum())


def test_ranges_are_cut_where_parts_begin():
    starts = [0, 5, 8]
    assert TokenShard(((3, 7), (8, 10))).cut(starts) == [(0, 3, 5), (1, 5, 7), (2, 8, 10)]
    assert TokenShard(((0, 12),)).cut(starts) == [(0, 0, 5), (1, 5, 8), (2, 8, 12)]
    assert TokenShard(((5, 6), (9, 12))).cut(starts) == [(1, 5, 6), (2, 9, 12)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_rows_together_ask_what_the_micro_batch_asks(ranks):
    batch = pack(GROUPS, SCORES, multiple=ranks)
    batch.shards = shard_tokens(batch.tree.positions() + 1, ranks)
    locals_ = [localize(batch, rank) for rank in range(ranks)]
    tokens = torch.cat([local.tokens for local in locals_])
    assert torch.equal(tokens[locals_[0].exchange.token_slots], batch.tokens)
    assert torch.equal(
        torch.cat([local.positions for local in locals_])[locals_[0].exchange.token_slots], batch.tree.positions()
    )
    row = torch.arange(batch.row_positions.numel()).repeat_interleave(batch.offsets.diff())
    asked, at = [], []
    for local in locals_:
        pad = local.exchange.logprob_width - local.ids.numel()
        local_row = torch.arange(local.row_positions.numel()).repeat_interleave(local.offsets.diff())
        positions = local.exchange.shard.index()[local.row_positions[local_row]]
        asked.append(torch.nn.functional.pad(local.ids, (0, pad), value=-1))
        at.append(torch.nn.functional.pad(positions, (0, pad), value=-1))
    slots = locals_[0].exchange.logprob_slots
    assert torch.equal(torch.cat(asked)[slots], batch.ids)
    assert torch.equal(torch.cat(at)[slots], batch.row_positions[row])


def test_padding_alone_can_be_sharded():
    batch = pack([], SCORES, multiple=2)
    batch.shards = shard_tokens(batch.tree.positions() + 1, 2)
    for rank in range(2):
        local = localize(batch, rank)
        assert local.tokens.tolist() == [0]
        assert local.ids.numel() == local.exchange.logprob_slots.numel() == 0
        assert local.offsets.tolist() == [0] and local.exchange.logprob_width == 1


def test_without_shards_one_rank_runs_everything():
    batch = pack(GROUPS, SCORES)
    local = localize(batch, 0)
    assert local.exchange is None
    assert local.tokens is batch.tokens and local.ids is batch.ids

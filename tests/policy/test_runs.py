"""Which tokens share a call of attention, and that their keys and masks are the micro-batch's mask."""

import pytest
import torch

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.shards import shard_tokens
from real_megatron.policy.runs import Runs, runs_of
from tests.support.trees import random_tree

CPU = torch.device("cpu")


def rows_of(calls: Runs, total: int) -> torch.Tensor:
    """The mask that the runs together have, bool `[queries, total]`."""
    starts = [sum(calls.lengths[:i]) for i in range(len(calls.lengths))]
    rows = []
    for run in calls.runs:
        keys = torch.cat([torch.arange(starts[i], starts[i] + length) for i, length in run.pieces])
        assert run.keys == keys.numel() and len(set(keys.tolist())) == run.keys
        mask = torch.ones(run.keys, run.keys).tril().bool() if run.mask is None else run.mask
        row = torch.zeros(run.end - run.first, total, dtype=torch.bool)
        row[:, keys] = mask
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize("width", [64, 4096])
@pytest.mark.parametrize("seed", range(10))
def test_the_runs_together_are_the_mask(seed, width):
    ranks = 2 + seed % 3
    tree = random_tree(seed, multiple=ranks)
    for window in (None, 1, 50, 120):
        mask = tree.mask(window)
        calls = runs_of(tree, width, window, None, CPU)
        assert sum(calls.lengths) == tree.total
        assert torch.equal(rows_of(calls, tree.total), mask)
        for shard in shard_tokens(tree.positions() + 1, ranks):
            found = rows_of(runs_of(tree, width, window, shard, CPU), tree.total)
            assert torch.equal(found, mask[shard.index()])


def spans(tree: SegmentTree, width: int = 2048) -> list[tuple[int, int]]:
    return [(run.first, run.end) for run in runs_of(tree, width, None, None, CPU).runs]


def test_branches_join_their_response_and_responses_stay_apart():
    branches = [Segment(n) for n in (1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1)]
    segments = [Segment(700)]
    for length in (150, 200, 250):
        response = len(segments)
        segments += [Segment(length, 0), *(Segment(branch.length, response) for branch in branches)]
    assert spans(SegmentTree(tuple(segments))) == [(0, 700), (700, 863), (863, 1076), (1076, 1339)]


def test_a_small_group_is_one_run_and_a_wide_model_joins_less():
    group = SegmentTree((Segment(30), *(Segment(12, 0) for _ in range(8))))
    assert spans(group, width=64) == [(0, 126)]
    assert len(spans(group, width=4096)) > 1


def test_sequences_of_their_own_take_no_mask():
    """Also in two segments, and with a window that none exceeds."""
    tree = SegmentTree((Segment(300), Segment(20), Segment(2, 1)))
    calls = runs_of(tree, 512, 300, None, CPU)
    assert [(run.first, run.end, run.mask) for run in calls.runs] == [(0, 300, None), (300, 322, None)]
    assert all(run.mask is not None for run in runs_of(tree, 512, 10, None, CPU).runs)


def test_runs_are_found_once_for_all_layers():
    tree = random_tree(1)
    assert runs_of(tree, 64, None, None, CPU) is runs_of(tree, 64, None, None, CPU)

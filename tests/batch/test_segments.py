"""The tree's positions, mask and pair count against hand-written ones, and against sequences written out."""

import pytest
import torch

from real_megatron.batch.segments import Segment, SegmentTree
from tests.support.trees import dense_mask, random_tree, sequences

SHARED = SegmentTree((Segment(2), Segment(2, parent=0), Segment(1, parent=0), Segment(2)))
BRANCHED = SegmentTree(
    (Segment(2), Segment(2, parent=0), Segment(1, parent=1), Segment(0, parent=1), Segment(1, parent=0))
)


def test_positions_continue_from_the_prompt_and_restart_for_a_new_sequence():
    assert SHARED.positions().tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert SHARED.total == 7


def test_mask_shows_a_response_its_prompt_and_itself_only():
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [0, 0, 0, 0, 0, 1, 0],
            [0, 0, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(SHARED.mask(), expected)


def test_a_branch_of_a_response_continues_it():
    assert BRANCHED.starts == [0, 2, 4, 5, 5]
    assert BRANCHED.ends == [6, 5, 5, 5, 6]
    assert BRANCHED.offsets == [0, 2, 4, 4, 2]
    assert [BRANCHED.ancestors(i) for i in range(5)] == [[], [0], [0, 1], [0, 1], [0]]
    assert BRANCHED.positions().tolist() == [0, 1, 2, 3, 4, 2]
    assert BRANCHED.subtree_ends().tolist() == [6, 6, 5, 5, 5, 6]
    assert BRANCHED.mask()[4:].int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_pairs_count_the_mask(window):
    assert SHARED.attention_pairs(window) == int(SHARED.mask(window).sum())


def test_window_counts_the_token_itself_across_the_prompt_boundary():
    assert SHARED.mask(window=2)[3].tolist() == [False, False, True, True, False, False, False]
    assert SHARED.mask(window=2)[4].tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize("seed", range(20))
def test_a_deep_tree_is_its_sequences_written_out(seed):
    tree = random_tree(seed)
    seen = sequences(tree)
    assert tree.total == len(seen) and tree.lengths == [s.length for s in tree.segments]
    assert tree.positions().tolist() == [len(tokens) - 1 for tokens in seen]
    for i, (start, segment) in enumerate(zip(tree.starts, tree.segments, strict=True)):
        parents = tree.ancestors(i)
        assert [tree.segments[j].parent for j in [*parents, i]] == [None, *parents]
        assert tree.offsets[i] == sum(tree.lengths[j] for j in parents)
        inside = [j for j in range(len(tree.segments)) if j == i or i in tree.ancestors(j)]
        assert tree.ends[i] == start + sum(tree.lengths[j] for j in inside)
        assert tree.subtree_ends()[start : start + segment.length].tolist() == [tree.ends[i]] * segment.length
    q = torch.arange(tree.total)
    for window in (None, 1, 3, 100):
        mask = dense_mask(tree, window)
        assert torch.equal(tree.mask(window), mask)
        assert tree.attention_pairs(window) == int(mask.sum())
    assert torch.equal((q <= q[:, None]) & (q[:, None] < tree.subtree_ends()), tree.mask())


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ((0,), "segment 0: its parent 0 must come before it"),
        ((None, 2, None), "segment 1: its parent 2 must come before it"),
        ((None, -1), "segment 1: its parent -1 must come before it"),
        ((None, None, 0), "segment 2: between its parent 0 and it stands another sequence"),
        ((None, 0, 0, 1), "segment 3: between its parent 1 and it stands another sequence"),
        ((None, 0, 1, 0, 2), "segment 4: between its parent 2 and it stands another sequence"),
    ],
)
def test_segments_out_of_depth_first_order_are_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        SegmentTree(tuple(Segment(1, parent) for parent in parents))


def test_an_empty_tree_has_no_tokens():
    assert SegmentTree(()).positions().tolist() == []

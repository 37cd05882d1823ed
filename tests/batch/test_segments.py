"""The tree's positions, mask and pair count against hand-written ones."""

import pytest
import torch

from real_megatron.batch.segments import Segment, SegmentTree

SHARED = SegmentTree((Segment(2), Segment(2, parent=0), Segment(1, parent=0), Segment(2)))


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


DEEP = SegmentTree((Segment(2), Segment(3, 0), Segment(1, 1), Segment(2, 2), Segment(1, 1), Segment(2, 0), Segment(1)))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("tree", [SHARED, DEEP])
def test_pairs_count_the_mask(tree, window):
    assert tree.attention_pairs(window) == int(tree.mask(window).sum())


def test_a_token_sees_those_before_it_whose_subtree_goes_on():
    assert DEEP.positions().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 2, 3, 0]
    assert DEEP.subtree_ends().tolist() == [11, 11, 9, 9, 9, 8, 8, 8, 9, 11, 11, 12]
    token = torch.arange(DEEP.total)
    expected = (token <= token[:, None]) & (token[:, None] < DEEP.subtree_ends())
    assert torch.equal(DEEP.mask(), expected)
    assert [DEEP.ancestors(i) for i in range(7)] == [[], [0], [0, 1], [0, 1, 2], [0, 1], [0], []]


def test_window_counts_the_token_itself_across_the_prompt_boundary():
    assert SHARED.mask(window=2)[3].tolist() == [False, False, True, True, False, False, False]
    assert SHARED.mask(window=2)[4].tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((Segment(1, parent=0),), "segment 0: its parent 0 must come before it"),
        ((Segment(1), Segment(1, parent=2), Segment(1)), "segment 1: its parent 2 must"),
        ((Segment(1), Segment(1), Segment(1, parent=0)), "segment 2: between its parent 0 and it stands another"),
        ((Segment(1), Segment(1, 0), Segment(1, 0), Segment(1, 1)), "segment 3: between its parent 1 and it"),
    ],
)
def test_a_segment_comes_behind_its_parents_subtrees(segments, message):
    with pytest.raises(ValueError, match=message):
        SegmentTree(segments)


def test_an_empty_tree_has_no_tokens():
    assert SegmentTree(()).positions().tolist() == []

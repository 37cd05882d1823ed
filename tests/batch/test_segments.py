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


@pytest.mark.parametrize("window", [None, 1, 2, 3])
def test_pairs_count_the_mask(window):
    assert SHARED.attention_pairs(window) == int(SHARED.mask(window).sum())


def test_window_counts_the_token_itself_across_the_prompt_boundary():
    assert SHARED.mask(window=2)[3].tolist() == [False, False, True, True, False, False, False]
    assert SHARED.mask(window=2)[4].tolist() == [False, True, False, False, True, False, False]


@pytest.mark.parametrize(
    "segments", [(Segment(1, parent=0),), (Segment(1), Segment(1, parent=0), Segment(1, parent=1))]
)
def test_a_parent_must_be_an_earlier_prompt(segments):
    with pytest.raises(ValueError, match="segment"):
        SegmentTree(segments)


def test_an_empty_tree_has_no_tokens():
    assert SegmentTree(()).positions().tolist() == []

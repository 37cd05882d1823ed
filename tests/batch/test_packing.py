"""Packed rows against a plain per-trajectory definition: which token predicts what."""

import pytest
import torch

from real_megatron.batch.packing import pack, responses_of, rows_of, sampled_scores, tokens_of
from real_megatron.batch.types import Group, Trajectory
from real_megatron.scores import ScoreTree

SCORE_IDS = [7, 8, 9]
SCORES = ScoreTree.of_tokens(SCORE_IDS)


def groups() -> list[Group]:
    return [
        Group(
            [1, 2, 3],
            [
                Trajectory([10, 11, 12], answer_index=2, old_logprobs=[-1.0, -2.0, -3.0]),
                Trajectory([13, 14], answer_index=None, old_logprobs=[-4.0, -5.0]),
                Trajectory([], answer_index=None, old_logprobs=[]),
            ],
            label=2.0,
        ),
        Group(
            [4],
            [Trajectory([15, 16, 17], answer_index=2, loss_mask=[True, False, False], old_logprobs=[-6.0, 0.0, 0.0])],
            label=1.0,
        ),
    ]


def with_sampled_scores() -> list[Group]:
    """The same groups with a token sampled behind each anchor: a score, and, behind a forced anchor, none."""
    found = groups()
    scored, forced = found[0].trajectories[0], found[1].trajectories[0]
    found[0].trajectories[0] = Trajectory([*scored.response_ids, 9], 2, old_logprobs=[-1.0, -2.0, -3.0, -7.0])
    found[1].trajectories[0] = Trajectory(
        [*forced.response_ids, 20], 2, loss_mask=[True, False, False, True], old_logprobs=[-6.0, 0.0, 0.0, -8.0]
    )
    return found


def expected_rows(groups: list[Group]) -> list[tuple[int, tuple[int, ...], list[int]]]:
    """(trajectory, tokens up to and including the row, ids asked) for every row, token rows first."""
    token_rows, answer_rows, index = [], [], 0
    for group in groups:
        for t in group.trajectories:
            sequence = group.prompt_ids + t.response_ids
            for i, keep in enumerate(t.loss_mask):
                if keep:
                    token_rows.append((index, tuple(sequence[: len(group.prompt_ids) + i]), [t.response_ids[i]]))
            if t.answer_index is not None:
                answer_rows.append((index, tuple(sequence[: len(group.prompt_ids) + t.answer_index + 1]), SCORE_IDS))
            index += 1
    return token_rows + answer_rows


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("make", [groups, with_sampled_scores])
def test_rows_read_the_context_that_predicts_them(make, share_prompt):
    packed = pack(make(), SCORES, share_prompt)
    mask = packed.tree.mask()
    found = []
    trajectories = torch.cat((packed.token_trajectory, packed.answer_trajectory)).tolist()
    for r, position in enumerate(packed.row_positions.tolist()):
        context = tuple(packed.tokens[mask[position]].tolist())
        ids = packed.ids[packed.offsets[r] : packed.offsets[r + 1]].tolist()
        found.append((trajectories[r], context, ids))
    assert found == expected_rows(make())
    assert packed.group.tolist() == [0, 0, 0, 1]
    assert packed.labels.tolist() == [2.0, 2.0, 2.0, 1.0]
    sampled = make is with_sampled_scores
    assert packed.old_logprobs.tolist() == ([-1, -2, -3, -7, -4, -5, -6, -8] if sampled else [-1, -2, -3, -4, -5, -6])
    assert packed.advantages is None


def test_the_sampled_score_is_the_token_behind_the_answer_position():
    """-1 for a token that is no score, and without an answer; None where a response ends at its anchor."""
    assert pack(with_sampled_scores(), SCORES).sampled.tolist() == [2, -1, -1, -1]
    assert pack(groups(), SCORES).sampled is None
    assert sampled_scores([groups()[1], with_sampled_scores()[0]], SCORES) is None
    assert pack([], SCORES).sampled.tolist() == []


def test_a_shared_prompt_runs_once():
    group = groups()[0]
    assert tokens_of(group, SCORES) == 3 + 5 == pack([group], SCORES).tree.total
    assert tokens_of(group, SCORES, share_prompt=False) == 9 + 5 == pack([group], SCORES, share_prompt=False).tree.total


def test_rows_of_a_group_are_those_that_it_packs_to():
    assert [rows_of(group, SCORES) for group in groups()] == [6, 2]
    assert [rows_of(group, SCORES) for group in with_sampled_scores()] == [7, 3]
    for group in groups() + with_sampled_scores():
        assert rows_of(group, SCORES) == pack([group], SCORES).row_positions.numel()


def test_padding_is_a_segment_that_no_row_reads():
    packed = pack(groups(), SCORES, multiple=8)
    real = pack(groups(), SCORES).tree.total
    assert packed.tree.total == 16 and real == 12
    assert int(packed.row_positions.max()) < real
    assert not packed.tree.mask()[:real, real:].any()


def test_no_groups_pack_to_padding_alone():
    packed = pack([], SCORES, multiple=4)
    assert packed.tree.total == 4
    assert pack([], SCORES, multiple=4, empty=10).tree.total == 12
    assert packed.row_positions.numel() == packed.ids.numel() == packed.num_trajectories == 0
    assert packed.offsets.tolist() == [0]


def test_log_probs_on_some_trajectories_only_are_refused():
    mixed = groups()
    mixed[1].trajectories[0].old_logprobs = None
    with pytest.raises(ValueError, match="1 of 4 trajectories have no old_logprobs"):
        pack(mixed, SCORES)


def test_advantages_on_some_trajectories_only_are_refused():
    mixed = groups()
    mixed[0].trajectories[0].advantage = 1.0
    with pytest.raises(ValueError, match="cannot share a micro-batch"):
        pack(mixed, SCORES)


def test_responses_follow_the_trajectories_with_their_rows_metadata():
    read = groups()
    read[0].meta, read[1].meta = {"source": "a"}, {"source": "b"}
    for group in read:
        for trajectory in group.trajectories:
            trajectory.text = f"text of {trajectory.response_ids}"
    expected = [
        ("text of [10, 11, 12]", {"source": "a"}),
        ("text of [13, 14]", {"source": "a"}),
        ("text of []", {"source": "a"}),
        ("text of [15, 16, 17]", {"source": "b"}),
    ]
    assert pack(read, SCORES).responses == responses_of(read) == expected
    read[0].trajectories[1].text = None
    assert pack(read, SCORES).responses is None
    assert pack(groups(), SCORES).responses is None
    assert pack([], SCORES).responses == []


def test_labels_of_aspects_are_a_row_each() -> None:
    """A label that is missing is NaN; the overall label is not read then."""
    found = groups()
    found[0].labels, found[1].labels = (1.0, None), (None, 3.0)
    nan = float("nan")
    expected = torch.tensor([[1.0, nan]] * 3 + [[nan, 3.0]])
    assert pack(found, SCORES).labels.dtype == torch.float32
    torch.testing.assert_close(pack(found, SCORES).labels, expected, equal_nan=True)

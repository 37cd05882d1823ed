"""The parts of a reinforcement-learning step."""

import pytest

from real_megatron.batch.types import Group, Trajectory
from real_megatron.training.rollouts import NothingToTrain, cot_metrics, trainable
from real_megatron.training.update import mini_batches
from tests.support.policy_ranks import make_config, make_groups, write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.training_ranks import two_updates


def group(*responses: list[int]) -> Group:
    return Group([1], [Trajectory(ids, len(ids) - 1) for ids in responses], label=1.0)


def test_groups_too_small_to_compare_are_left_out_and_none_left_is_an_error() -> None:
    groups = [group([1]), group([1], [2]), group()]
    assert trainable(groups, 2) == [groups[1]]
    with pytest.raises(NothingToTrain, match="none of the 2 prompts kept 2 responses"):
        trainable([groups[0], groups[2]], 2)


def test_mini_batches_cover_the_batch_in_order_and_are_balanced() -> None:
    groups = make_groups(count=7)
    for count in (1, 2, 3, 7, 9):
        cut = mini_batches(groups, count)
        assert [g for part in cut for g in part] == groups
        assert len(cut) == min(count, 7) and max(map(len, cut)) - min(map(len, cut)) <= 1


def test_several_updates_are_several_steps(tmp_path) -> None:
    config = make_config(write_checkpoint(tmp_path), objective={"ratio": "truncated_is"}, batch={"mini_batches": 2})
    whole, steps = run_ranks(1, two_updates, config)[0]
    assert whole["loss"] == (steps[0]["loss"] + steps[1]["loss"]) / 2
    assert whole["tokens"] == steps[0]["tokens"] + steps[1]["tokens"] and whole["updates"] == 2.0


def test_copies_and_distinct_n_show_degeneration() -> None:
    varied = cot_metrics([group([1, 2, 3], [4, 5, 6])])
    copied = cot_metrics([group([1, 2, 3], [1, 2, 3])])
    assert varied["cot/copies"] == 0.0 and copied["cot/copies"] == 0.5
    assert varied["cot/distinct_2"] == 1.0 and copied["cot/distinct_2"] == 0.5

"""The visiting order: every example once per epoch, a function of seed and step alone."""

from collections import Counter

import pytest

from real_megatron.training.batch_order import BatchOrder, rollout_seed


def test_every_epoch_visits_every_example_once_also_across_batch_borders() -> None:
    order = BatchOrder(7, 3, seed=1)
    visited = [i for step in range(7) for i in order.batch(step)]
    for epoch in range(3):
        assert sorted(visited[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    assert visited[:7] != visited[7:14]


def test_a_batch_depends_on_seed_and_step_only() -> None:
    one, other = BatchOrder(50, 8, seed=3), BatchOrder(50, 8, seed=3)
    forward = [one.batch(step) for step in range(20)]
    assert [other.batch(step) for step in reversed(range(20))] == forward[::-1]
    assert [BatchOrder(50, 8, seed=4).batch(step) for step in range(20)] != forward


def test_neighbouring_seeds_share_no_epoch() -> None:
    """As they would if seed and number of the epoch were added."""
    first, second = (BatchOrder(50, 50, seed=seed) for seed in (0, 1))
    assert first.batch(1) != second.batch(0)


def test_batches_larger_than_the_data_hold_whole_epochs() -> None:
    assert Counter(BatchOrder(3, 9, seed=0).batch(5)) == Counter({0: 3, 1: 3, 2: 3})


def test_steps_of_epochs_rounds_up() -> None:
    order = BatchOrder(10, 4, seed=0)
    assert order.steps_of(1) == 3 and order.steps_of(2) == 5 and order.steps_of(0.4) == 1


def test_no_examples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no training examples"):
        BatchOrder(0, 4, seed=0)


def test_rollout_seeds_differ_by_seed_step_and_position() -> None:
    seeds = {rollout_seed(s, t, i) for s in range(3) for t in range(3) for i in range(20)}
    assert len(seeds) == 180 and all(0 <= s < 2**63 for s in seeds)
    assert rollout_seed(1, 2, 3) == rollout_seed(1, 2, 3)

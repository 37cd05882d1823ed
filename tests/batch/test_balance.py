"""Properties of every plan, and a comparison with the best plan found by enumeration."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from real_megatron.batch.balance import balance, imbalance

COSTS = st.lists(st.integers(1, 60), min_size=0, max_size=40)


@settings(max_examples=150, deadline=None)
@given(sizes=COSTS, budget=st.integers(10, 100), ranks=st.integers(1, 4), multiple=st.integers(1, 3))
def test_every_item_once_within_budget_and_equal_counts(sizes, budget, ranks, multiple):
    costs = [size + 0.01 * size**2 for size in sizes]
    plan = balance(costs, sizes, budget, ranks, multiple)
    assert len(plan) == ranks
    assert len({len(mine) for mine in plan}) == 1
    assert len(plan[0]) % multiple == 0 and len(plan[0]) > 0
    microbatches = [items for mine in plan for items in mine]
    assert sorted(i for items in microbatches for i in items) == list(range(len(sizes)))
    assert all(len(items) <= 1 or sum(sizes[i] for i in items) <= budget for items in microbatches)


@settings(max_examples=60, deadline=None)
@given(costs=st.lists(st.integers(1, 20), min_size=2, max_size=8))
def test_longest_first_is_within_its_bound_of_the_best_split(costs):
    """Graham's bound for two machines: at most 4/3 − 1/6 = 7/6 of the optimum."""
    plan = balance(costs, costs, budget=1000, ranks=2)
    busiest = max(sum(costs[i] for items in mine for i in items) for mine in plan)
    best = min(
        max(sum(costs[i] for i in chosen), sum(costs) - sum(costs[i] for i in chosen))
        for size in range(len(costs) + 1)
        for chosen in itertools.combinations(range(len(costs)), size)
    )
    assert busiest <= best * 7 / 6 + 1e-9


def test_items_may_fill_the_budget_exactly():
    assert balance([1, 1], [4, 4], budget=8, ranks=1) == [[[0, 1]]]
    assert len(balance([1, 1], [4, 4], budget=7, ranks=1)[0]) == 2


def test_imbalance_is_the_fraction_of_waiting():
    assert imbalance([3, 1], [[[0]], [[1]]]) == 1 - 2 / 3
    assert imbalance([2, 2], [[[0]], [[1]]]) == 0
    assert imbalance([], [[[]], [[]]]) == 0

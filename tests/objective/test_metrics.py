"""Pairs and their reduction."""

import pytest
import torch

from real_megatron.objective.metrics import loss_pair, merge, pair, sample, summarize


def test_pairs() -> None:
    x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert pair(x).tolist() == [7, 3] and not pair(x).requires_grad
    assert pair(x, torch.tensor([True, False, True])).tolist() == [5, 2]
    assert pair(x[:0]).tolist() == [0, 0]
    assert loss_pair(x.sum(), 0.25).tolist() == [7, 0.25]


def test_summaries_leave_out_what_was_not_measured() -> None:
    pairs = {"a": torch.tensor([6.0, 3.0]), "b": torch.tensor([0.0, 0.0])}
    assert summarize(pairs) == {"a": 2.0}


def test_percentiles_are_of_all_micro_batches_together() -> None:
    values = torch.arange(101.0).flip(0).requires_grad_()
    chosen = torch.arange(101) % 2 == 0
    parts = [{"r": sample(v, c)} for v, c in zip(values.split(40), chosen.split(40), strict=True)]
    assert summarize(merge(parts)) == {"r/p05": 5, "r/p25": 25, "r/p50": 50, "r/p75": 75, "r/p95": 95}
    assert not parts[0]["r"].requires_grad
    one = {"r": sample(values, torch.arange(101) == 7)}
    assert set(summarize(merge([one])).values()) == {93.0}  # a sample of one is no maximum
    assert summarize(merge([{"r": sample(values, chosen & False)}])) == {}


def test_the_deviation_is_over_the_whole_batch() -> None:
    """Not the mean of the micro-batches' deviations."""
    first, second = torch.tensor([1.0, 1.0]), torch.tensor([5.0, 5.0])
    pairs = {"advantage": pair(first) + pair(second), "advantage_square": pair(first**2) + pair(second**2)}
    assert summarize(pairs) == {"advantage": 3.0, "advantage_std": pytest.approx(2.0)}

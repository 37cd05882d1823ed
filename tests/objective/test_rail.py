"""Readings of the score distribution, on numbers that can be checked by head."""

import math

import pytest
import torch

from real_megatron.objective.rail import expected_score, label_index, label_logprob, score_entropy, score_mass
from real_megatron.scores import ScoreScale, ScoreTree

VALUES = torch.tensor([1.0, 2.0, 4.0])
LOGP = torch.tensor([[0.1, 0.2, 0.5], [0.25, 0.0625, 0.0625]]).log()


def test_full_probabilities_lose_what_leaks_and_renormalized_ones_do_not() -> None:
    torch.testing.assert_close(expected_score(LOGP, VALUES), torch.tensor([2.5, 0.625]))
    torch.testing.assert_close(expected_score(LOGP, VALUES, "renormalized"), torch.tensor([2.5 / 0.8, 0.625 / 0.375]))
    torch.testing.assert_close(score_mass(LOGP), torch.tensor([0.8, 0.375]))


def test_entropy_is_over_the_scores_alone() -> None:
    uniform = torch.full((1, 4), math.log(0.01))
    torch.testing.assert_close(score_entropy(uniform), torch.tensor([math.log(4)]))
    certain = torch.tensor([[0.0, -200.0, -200.0]])
    torch.testing.assert_close(score_entropy(certain), torch.tensor([0.0]))
    q = torch.tensor([2 / 3, 1 / 6, 1 / 6])
    torch.testing.assert_close(score_entropy(LOGP[1:]), -(q * q.log()).sum()[None])


@pytest.mark.parametrize(("label", "index"), [(1, 0), (1.4, 0), (1.5, 0), (1.6, 1), (3.0, 1), (3.1, 2), (4, 2)])
def test_a_label_between_scores_reads_the_nearest_and_a_tie_the_first(label: float, index: int) -> None:
    labels = torch.tensor([float(label)])
    assert label_index(labels, VALUES).tolist() == [index]
    torch.testing.assert_close(label_logprob(LOGP[:1], VALUES, labels), LOGP[0, index][None])


@pytest.mark.parametrize("step", [0.1, 0.25, 1.0, 10.0])
def test_ties_are_the_same_in_training_and_in_targets(step: float) -> None:
    """The target of supervised training has the score of `ScoreScale`, its squared error and log-prob that of tensors.

    0.15 - 0.1 and 0.2 - 0.15 differ in float64 and in float32, each in its own direction.
    """
    values = [step * k for k in range(11)]
    scale = ScoreScale([str(k) for k in range(11)], values, ScoreTree.of_tokens(range(11)), [0], "")
    labels = [step * k / 2 for k in range(21)] + [step * (k + e) for k in range(11) for e in (-0.498, 0.498)]
    expected = [k // 2 for k in range(21)] + [k for k in range(11) for _ in range(2)]
    assert [scale.label_index(label) for label in labels] == expected
    for dtype in (torch.float32, torch.float64):
        tensors = torch.tensor(labels, dtype=dtype), torch.tensor(values, dtype=dtype)
        assert label_index(*tensors).tolist() == expected


def test_steps_of_a_scale_may_differ_by_orders_of_magnitude() -> None:
    values = [0.0, 1.0, 1e6]
    scale = ScoreScale(["a", "b", "c"], values, ScoreTree.of_tokens([0, 1, 2]), [0], "")
    labels = [0.4, 0.6, 1.0, 1e6]
    assert [scale.label_index(label) for label in labels] == [0, 1, 1, 2]
    assert label_index(torch.tensor(labels), torch.tensor(values)).tolist() == [0, 1, 1, 2]


def test_values_in_any_order() -> None:
    assert label_index(torch.tensor([1.0, 4.9]), torch.tensor([5.0, 3.0, 1.0])).tolist() == [2, 0]

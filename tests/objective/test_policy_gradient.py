"""Token losses and importance weights by hand."""

import math

import pytest
import torch

from real_megatron.objective.policy_gradient import plain_loss, ppo_loss, truncated_weights

A = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0, -1.0])
RHO = torch.tensor([1.0, 1.5, 0.5, 1.0, 1.5, 0.5])
OLD = torch.full((6,), -1.0)


def test_plain() -> None:
    loss, clipped = plain_loss(torch.tensor([-1.0, -2.0]), torch.tensor([3.0, -1.0]))
    assert loss.tolist() == [3.0, -2.0] and not clipped.any()


def test_ppo_takes_the_pessimistic_side() -> None:
    loss, clipped = ppo_loss(OLD + RHO.log(), OLD, A, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.0, -2.4, -1.0, 1.0, 1.5, 0.8]))
    assert clipped.tolist() == [0, 1, 0, 0, 0, 1]


def test_ppo_at_ratio_one_has_the_plain_gradient() -> None:
    logp = OLD.clone().requires_grad_()
    (ppo,) = torch.autograd.grad(ppo_loss(logp, OLD, A, clip=0.2).loss.sum(), logp)
    (plain,) = torch.autograd.grad(plain_loss(logp, A).loss.sum(), logp)
    torch.testing.assert_close(ppo, plain)


def test_truncated_weights() -> None:
    trajectory = torch.tensor([0, 0, 2, 2])
    logp = torch.tensor([2.0, 0.6, 0.5, 0.4]).log().requires_grad_()
    sequence = truncated_weights(logp, torch.zeros(4), trajectory, 3, "sequence", cap=1.1)
    # products over responses: 1.2, capped; 1 for a response without tokens; 0.2
    torch.testing.assert_close(sequence.trajectory, torch.tensor([1.1, 1.0, 0.2]))
    torch.testing.assert_close(sequence.token, torch.tensor([1.1, 1.1, 0.2, 0.2]))
    assert sequence.clipped.tolist() == [1, 1, 0, 0]
    token = truncated_weights(logp, torch.zeros(4), trajectory, 3, "token", cap=1.1)
    torch.testing.assert_close(token.token, torch.tensor([1.1, 0.6, 0.5, 0.4]))
    assert token.trajectory.tolist() == [1, 1, 1] and token.clipped.tolist() == [1, 0, 0, 0]
    assert not any(x.requires_grad for x in (*sequence, *token))


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_a_huge_ratio_is_capped_and_stays_finite(level: str) -> None:
    weights = truncated_weights(torch.zeros(2), torch.full((2,), -1e4), torch.zeros(2).long(), 1, level, cap=2.0)
    assert weights.token.tolist() == [2.0, 2.0] and math.isfinite(float(weights.trajectory))


def test_weights_of_whole_responses_lose_what_docs_mathematics_says() -> None:
    """Its table: 4,000 responses, a difference of 0.04 a token whose ratio has mean 1 under the sampler. The standard
    error of the mean of 4,000 weights of at most 2 is below 0.012, of the effective size about as much."""
    generator = torch.Generator().manual_seed(0)
    for length, mean, effective in ((50, 1.00, 0.93), (200, 0.95, 0.80), (600, 0.81, 0.64), (1000, 0.72, 0.55)):
        log_ratio = 0.04 * torch.randn(4000 * length, generator=generator) - 0.04**2 / 2
        trajectory = torch.arange(4000).repeat_interleave(length)
        found = {}
        for level in ("sequence", "token"):
            weights = truncated_weights(log_ratio, torch.zeros_like(log_ratio), trajectory, 4000, level, 2.0)
            w = (weights.trajectory if level == "sequence" else weights.token).double()
            found[level] = (w.mean().item(), (w.sum() ** 2 / (w**2).sum() / w.numel()).item())
        assert found["sequence"] == pytest.approx((mean, effective), abs=0.03), length
        assert found["token"] == pytest.approx((1.0, 1.0), abs=0.003), length

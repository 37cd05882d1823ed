"""Train–inference mismatch, against the exact divergence of small distributions."""

import pytest
import torch

from real_megatron.rollout.mismatch import mismatch


def test_kl_estimates_approach_the_exact_divergence():
    """Monte Carlo over a million tokens: standard errors below 1e-3 here."""
    g = torch.Generator().manual_seed(0)
    engine = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    policy = (engine + 0.4 * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(0)
    tokens = torch.multinomial(engine.exp(), 10**6, replacement=True, generator=g)
    result = mismatch([engine[tokens].tolist()], [policy[tokens].tolist()])
    exact = (engine.exp() * (engine - policy)).sum().item()
    assert exact > 0.005
    assert result["kl_k1"] == pytest.approx(exact, abs=1e-3)
    assert result["kl_k3"] == pytest.approx(exact, abs=1e-3)
    assert result["tokens"] == 10**6


def test_by_hand():
    result = mismatch([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    assert result["mean"] == pytest.approx(0.5) and result["max"] == 1.0
    assert result["kl_k1"] == pytest.approx((0.5 + 0 - 1) / 3)
    assert result["kl_k3"] > 0


def test_masked_tokens_do_not_count():
    result = mismatch([[-1.0, 0.0]], [[-1.0, -50.0]], [[True, False]])
    assert result == {"mean": 0.0, "max": 0.0, "kl_k1": 0.0, "kl_k3": 0.0, "tokens": 1.0}
    assert mismatch([], [])["tokens"] == 0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="trajectory 1: 2 log-probs of the engine, 1 of the policy"):
        mismatch([[-1.0], [-1.0, -2.0]], [[-1.0], [-1.0]])

"""Train–inference mismatch, against the exact divergence of small distributions."""

import pytest
import torch

from real_megatron.objective.metrics import merge, summarize
from real_megatron.objective.mismatch import mismatch_metrics


def test_kl_estimates_approach_the_exact_divergence():
    """Monte Carlo over a million tokens: standard errors below 1e-3 here."""
    g = torch.Generator().manual_seed(0)
    engine = torch.randn(6, generator=g, dtype=torch.float64).log_softmax(0)
    policy = (engine + 0.4 * torch.randn(6, generator=g, dtype=torch.float64)).log_softmax(0)
    tokens = torch.multinomial(engine.exp(), 10**6, replacement=True, generator=g)
    result = summarize(mismatch_metrics(policy[tokens], engine[tokens]))
    exact = (engine.exp() * (engine - policy)).sum().item()
    assert exact > 0.005
    assert result["mismatch/kl_k1"] == pytest.approx(exact, abs=1e-3)
    assert result["mismatch/kl_k3"] == pytest.approx(exact, abs=1e-3)


def test_by_hand_over_two_micro_batches():
    parts = [
        mismatch_metrics(torch.tensor([-1.5, -2.0], requires_grad=True), torch.tensor([-1.0, -2.0])),
        mismatch_metrics(torch.tensor([-2.0]), torch.tensor([-3.0])),
        mismatch_metrics(torch.zeros(0), torch.zeros(0)),
    ]
    result = summarize(merge(parts))
    assert result["mismatch/mean"] == pytest.approx(0.5) and result["mismatch/max"] == 1.0
    assert result["mismatch/kl_k1"] == pytest.approx((0.5 + 0 - 1) / 3)
    assert result["mismatch/kl_k3"] > 0

"""The k3 estimator."""

import torch

from real_megatron.objective.kl import k3


def test_zero_where_both_agree_and_positive_elsewhere() -> None:
    logp = torch.linspace(-5, -0.1, 20, dtype=torch.float64)
    assert k3(logp, logp).tolist() == [0.0] * 20
    assert (k3(logp, logp + 0.3) > 0).all() and (k3(logp, logp - 0.3) > 0).all()


def test_its_mean_is_the_divergence() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(11, generator=g, dtype=torch.float64), 0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    # an exact sum in float64, of terms of order 1
    torch.testing.assert_close((p.exp() * k3(p, q)).sum(), exact, rtol=1e-13, atol=0)


def test_small_differences_survive_float32() -> None:
    """exp(x) − 1 − x at x = 1e-3 is 5e-7: without expm1 the rounding of exp(x), 6e-8, would be a tenth of it. What
    remains is the rounding of x itself."""
    logp, ref = torch.tensor([0.0]), torch.tensor([1e-3])
    torch.testing.assert_close(k3(logp, ref), torch.tensor([5.0017e-7]), rtol=5e-4, atol=0)

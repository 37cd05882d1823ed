"""Sampling: the distribution that is drawn from, and what it may depend on."""

import numpy as np
import pytest
import torch

from real_megatron.rollout.embedded.seeded import SeededTokens, uniforms


def draw(logits: torch.Tensor, u: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0):
    chooser = SeededTokens(u[:, None].double(), temperature, top_p)
    scores = chooser(None, logits.expand(len(u), -1).clone())
    return scores.argmax(-1), chooser.logprobs()[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
def test_frequencies_over_an_even_grid_are_the_probabilities(temperature, top_p):
    """With u on a grid of N points each token's frequency must be within 1/N of its exact nucleus probability."""
    logits = torch.randn(1, 17, generator=torch.Generator().manual_seed(0)) * 2
    n = 20000
    chosen, logprobs = draw(logits, (torch.arange(n).double() + 0.5) / n, temperature, top_p)
    probs = (logits[0].double() / temperature).softmax(-1)
    order = sorted(range(17), key=lambda i: -probs[i])
    nucleus, mass = [], 0.0
    for i in order:
        if mass < top_p:
            nucleus.append(i)
        mass += probs[i].item()
    exact = torch.zeros(17, dtype=torch.float64)
    exact[nucleus] = probs[nucleus] / probs[nucleus].sum()
    frequency = chosen.bincount(minlength=17) / n
    torch.testing.assert_close(frequency.double(), exact, atol=1.01 / n, rtol=0)
    # Before top-p; fp32 log_softmax of seventeen numbers.
    torch.testing.assert_close(logprobs.double(), probs.log()[chosen], atol=1e-5, rtol=0)


def test_zero_temperature_is_greedy_at_temperature_one():
    logits = torch.tensor([[0.1, 3.0, 0.2]])
    chosen, logprobs = draw(logits, torch.rand(5), temperature=0)
    assert chosen.tolist() == [1] * 5
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, 1].expand(5))


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for top_p in (1.0, 0.99):
        chosen, _ = draw(logits, torch.tensor([0.0, 0.49999, 0.5, 1 - 2**-53], dtype=torch.float64), top_p=top_p)
        assert chosen.tolist() == [1, 1, 3, 3]


def test_uniforms_are_a_function_of_seed_and_sample_and_prefix_stable():
    assert np.array_equal(uniforms(3, 1, 5), uniforms(3, 1, 50)[:5])
    first = {uniforms(seed, k, 1)[0] for seed in (0, 1, 2**63, -1) for k in range(4)}
    assert len(first) == 16

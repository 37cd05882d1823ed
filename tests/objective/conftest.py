"""Random micro-batches for the objective's tests, in float64."""

from collections.abc import Callable

import pytest
import torch

from real_megatron.objective import ScoredBatch, Totals

VALUES = torch.arange(1.0, 6.0, dtype=torch.float64)
VOCABULARY = 9
"""Ids 0..4 are the scores; the others have the rest of the probability."""


def random_batch(
    sizes: tuple[int, ...] = (3, 2, 4), *, invalid: tuple[int, ...] = (1,), seed: int = 0, lengths: int = 5
) -> ScoredBatch:
    """Groups of `sizes` responses of 0..lengths-1 tokens; the trajectories `invalid` have no answer. The sampled score
    is the label's for every second trajectory, any score or none (-1) for the others."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    per_trajectory = torch.randint(0, lengths, (n,), generator=g)
    per_trajectory[0] = lengths
    tokens = int(per_trajectory.sum())
    logits = torch.randn(n, VOCABULARY, generator=g, dtype=torch.float64)
    token_logprobs = -torch.rand(tokens, generator=g, dtype=torch.float64) * 3
    group_labels = torch.randint(10, 51, (len(sizes),), generator=g).double() / 10
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    sampled = torch.randint(-1, 5, (n,), generator=g)
    sampled[::2] = (group_labels[group][::2] - 0.01).round().long() - 1
    has_answer = torch.ones(n, dtype=torch.bool)
    has_answer[list(invalid)] = False
    return ScoredBatch(
        token_logprobs=token_logprobs.requires_grad_(),
        token_trajectory=torch.repeat_interleave(torch.arange(n), per_trajectory),
        score_logprobs=torch.log_softmax(logits, -1)[:, :5].requires_grad_(),
        has_answer=has_answer,
        labels=group_labels[group],
        group=group,
        values=VALUES,
        old_logprobs=token_logprobs.detach() + 0.3 * torch.randn(tokens, generator=g, dtype=torch.float64),
        ref_logprobs=token_logprobs.detach() + 0.5 * torch.randn(tokens, generator=g, dtype=torch.float64),
        sampled=sampled,
    )


@pytest.fixture
def batch() -> Callable[..., ScoredBatch]:
    return random_batch


@pytest.fixture
def totals() -> Callable[[ScoredBatch], Totals]:
    """Totals of a batch that is one micro-batch."""
    return lambda scored: Totals(
        float(scored.group.max()) + 1, float(scored.size), float(scored.token_logprobs.numel())
    )

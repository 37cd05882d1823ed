"""log π of scores that are several tokens, against every string of tokens that a model could write."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from real_megatron.batch.score_logprobs import RESOLUTION, score_logprobs
from real_megatron.objective.rail import expected_score
from real_megatron.scores import ScoreTree

VOCABULARY = 5
TREES = {
    "one token": ScoreTree.of_tokens([0, 2, 3]),
    "one token, two spellings": ScoreTree([[[0], [1]], [[2]]]),
    "1, 10, 2": ScoreTree([[[0]], [[0, 1]], [[2]]]),
    "1, 10, 2 and an end": ScoreTree([[[0]], [[0, 1]], [[2]]], ends=[4]),
    "1, 10, 100, 2 and two ends": ScoreTree([[[0]], [[0, 1]], [[0, 1, 1]], [[2]]], ends=[4, 3]),
    "1, 10, 100, 11": ScoreTree([[[0]], [[0, 1]], [[0, 1, 1]], [[0, 0]]]),
    "halves": ScoreTree([[[0]], [[0, 4, 1]], [[2]], [[2, 4, 1]]]),
    "10, 11, 12": ScoreTree([[[0, 1]], [[0, 0]], [[0, 2]]]),
    # "5", " 5" and "5.0" are one score: whatever follows the 5 of "5" that is not ".", or ".0".
    "a spelling that begins another": ScoreTree([[[0], [3, 0], [0, 4, 1]], [[1], [3, 1]]]),
    "the same with an end": ScoreTree([[[0], [3, 0], [0, 4, 1]], [[1], [3, 1]]], ends=[2]),
}


def table(seed: int, spread: float = 1.5) -> dict[tuple[int, ...], Tensor]:
    """A model: next-token log-probs [VOCABULARY] behind every prefix of up to three tokens, float64."""
    g = torch.Generator().manual_seed(seed)
    prefixes = (p for n in range(4) for p in itertools.product(range(VOCABULARY), repeat=n))
    return {p: (torch.randn(VOCABULARY, generator=g, dtype=torch.float64) * spread).log_softmax(-1) for p in prefixes}


def asked(tree: ScoreTree, model: dict[tuple[int, ...], Tensor]) -> Tensor:
    """What the tree's branches ask the model for [width]."""
    return torch.cat([model[branch.path][list(branch.ids)] for branch in tree.branches])


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_score_has_the_probability_of_all_strings_that_say_it(name: str, seed: int) -> None:
    """All strings of `most_tokens` tokens, each read by `ScoreTree.read`. Sums of at most 625 products in float64:
    tolerance 1e-12. What is no score is what is left."""
    tree, model = TREES[name], table(seed)
    said = torch.zeros(tree.size + 1, dtype=torch.float64)
    for tokens in itertools.product(range(VOCABULARY), repeat=tree.most_tokens):
        probability = math.exp(sum(float(model[tokens[:t]][token]) for t, token in enumerate(tokens)))
        score, count = tree.read(tokens)
        assert 1 <= count <= tree.most_tokens
        # The tokens that decide are enough: what follows them says nothing.
        assert tree.read(tokens[:count]) == (score, count) and tree.read(tokens[: count - 1]) == (None, count)
        said[tree.size if score is None else score] += probability
    got = score_logprobs(tree, asked(tree, model))
    torch.testing.assert_close(got.exp(), said[:-1], rtol=0, atol=1e-12)
    ones = torch.ones(tree.size, dtype=torch.float64)
    full, renormalized = (expected_score(got[None], ones, kind).item() for kind in ("full", "renormalized"))
    assert full == pytest.approx(1 - said[-1].item(), abs=1e-12) and full < 1
    assert renormalized == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", TREES)
def test_gradients_are_those_of_the_probabilities(name: str) -> None:
    tree = TREES[name]
    rows = torch.stack([table(2)[branch.path] for branch in tree.branches]).requires_grad_()

    def of_logits(rows: Tensor) -> Tensor:
        logp = rows.log_softmax(-1)
        return score_logprobs(tree, torch.cat([logp[i, list(b.ids)] for i, b in enumerate(tree.branches)]))

    assert torch.autograd.gradcheck(of_logits, rows)


def test_answers_of_any_leading_shape_and_dtype() -> None:
    tree = TREES["1, 10, 100, 11"]
    logprobs = torch.stack([asked(tree, table(seed)) for seed in range(6)])
    got = score_logprobs(tree, logprobs.view(2, 3, -1))
    assert got.shape == (2, 3, tree.size)
    torch.testing.assert_close(got.view(6, -1)[4], score_logprobs(tree, logprobs[4]), rtol=0, atol=0)
    single = score_logprobs(tree, logprobs.float())
    assert single.dtype == torch.float32
    # Rounding of the five log-probs that a score is made of, of size 5 at most: 6e-8 · 5 · 5.
    torch.testing.assert_close(single.double(), got.view(6, -1), rtol=0, atol=2e-6)
    assert score_logprobs(tree, logprobs[:0]).shape == (0, tree.size)


@pytest.mark.parametrize("gap", [3.0, 10.0, 20.0, 60.0])
def test_a_score_that_hardly_ever_ends_is_finite_in_float32(gap: float) -> None:
    """A "1" which goes on to "10" with probability 1 − e^−gap. Beyond the resolution of float32 the probability of all
    else counts as `RESOLUTION`, and the gradient still says that "0" must become less probable for "1" to become more
    so. Where it is above it, float32 is as near as log-probs near 0 allow: 6e-8 / e^−10 is 1.4e-3."""
    tree = TREES["1, 10, 2"]
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0], [0.0, gap, 0.0, 0.0, 0.0]])

    def one(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.clone().requires_grad_()
        logp = logits.log_softmax(-1)
        asked = torch.cat([logp[0, [0, 2]], logp[1, [1]]])
        value = score_logprobs(tree, asked)[0]
        return value.detach(), torch.autograd.grad(value, [logits, asked])[1][2]

    value, gradient = one(logits)
    assert value.isfinite() and gradient.isfinite() and gradient < 0
    if gap <= 10:
        exact, exact_gradient = one(logits.double())
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=2e-3)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2e-3, atol=0)
    else:
        assert value.item() == pytest.approx(math.log(RESOLUTION / VOCABULARY), abs=1e-3)


def test_what_cannot_follow_takes_nothing() -> None:
    """A token of probability 0 goes on from nowhere: not a NaN, neither as value nor as gradient."""
    tree = TREES["1, 10, 2"]
    logprobs = torch.tensor([-0.5, -1.0, -torch.inf], requires_grad=True)
    got = score_logprobs(tree, logprobs)
    assert got.tolist() == [-0.5, -torch.inf, -1.0]
    got[[0, 2]].sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [1, 1, 0]

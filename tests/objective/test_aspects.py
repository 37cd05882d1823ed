"""Several scores of one response: the estimators against exact objectives, and what each aspect contributes.

The policy is a table of logits in float64, small enough to enumerate every CoT and every score. Two forms: each
aspect's score is read behind the critique alone; or the second is read behind the first, which is sampled, an action as
the CoT is. The objective's gradient comes from central differences of J(θ); at step 1e-5 they are accurate to about
1e-9 here.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real_megatron.config import ObjectiveConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective, summarize
from real_megatron.scores import Aspect

COTS, FIRST, SECOND = 3, 3, 4
"""CoTs, and the vocabularies behind each aspect's anchor: its scores and a token that probability leaks to."""
ASPECTS = (Aspect("tone", ["1", "2"], [1.0, 2.0], 0, 1.0), Aspect("facts", ["0", "1", "4"], [0.0, 1.0, 4.0], 2, 3.0))
VALUES = torch.tensor([1.0, 2.0, 0.0, 1.0, 4.0], dtype=torch.float64)
LABELS = (1.6, 3.0)
TOLERANCE = dict(rtol=0.0, atol=1e-7)


def tables(theta: Tensor, in_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """log π of the CoT [C], of the first answer [C, 3] and of the second [C, first, 4]."""
    sizes = [COTS, COTS * FIRST, COTS * FIRST * SECOND]
    cot, first, second = theta.split(sizes)
    second = second.view(COTS, FIRST, SECOND)
    if not in_order:
        second = second[:, :1].expand_as(second)
    return cot.log_softmax(0), first.view(COTS, FIRST).log_softmax(1), second.log_softmax(2)


def reward(answers: Tensor, aspect: int) -> Tensor:
    values, label = VALUES[ASPECTS[aspect].columns], LABELS[aspect]
    p = answers[..., : len(values)].exp()
    nearest = int((values - label).abs().argmin())
    return -((p @ values - label) ** 2) + 0.5 * answers[..., nearest]


def exact(theta: Tensor, in_order: bool, labelled: tuple[bool, bool]) -> Tensor:
    cot, first, second = tables(theta, in_order)
    weights = [aspect.weight * has for aspect, has in zip(ASPECTS, labelled, strict=True)]
    total = sum(weights)
    # Over the first score too: the second's reward depends on it in one form, and is the same for all in the other.
    r = weights[0] * reward(first, 0)[:, None] + weights[1] * reward(second, 1)
    return (cot.exp()[:, None] * first.exp() * r / total).sum()


def batch(theta: Tensor, chosen: list[tuple[int, int]], in_order: bool, labelled: tuple[bool, bool]) -> ScoredBatch:
    """One group of responses (CoT, sampled first score)."""
    cot, first, second = tables(theta, in_order)
    tokens, trajectory = [], []
    for i, (c, s) in enumerate(chosen):
        tokens += [cot[c], first[c, s]] if in_order else [cot[c]]
        trajectory += [i, i] if in_order else [i]
    n = len(chosen)
    logprobs = torch.stack([torch.cat([first[c, :2], second[c, s, :3]]) for c, s in chosen])
    labels = torch.tensor([[y if has else math.nan for y, has in zip(LABELS, labelled, strict=True)]] * n)
    return ScoredBatch(
        token_logprobs=torch.stack(tokens),
        token_trajectory=torch.tensor(trajectory),
        score_logprobs=logprobs,
        has_answer=torch.ones(n, dtype=torch.bool),
        labels=labels.double(),
        group=torch.zeros(n, dtype=torch.long),
        values=VALUES,
        aspects=ASPECTS,
    )


@pytest.mark.parametrize("labelled", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("in_order", [False, True])
def test_the_estimator_is_unbiased(in_order: bool, labelled: tuple[bool, bool]) -> None:
    theta = torch.randn(COTS * (1 + FIRST * (1 + SECOND)), generator=torch.Generator().manual_seed(1)).double()
    objective = build_objective(ObjectiveConfig(lam=0.5))
    responses = list(itertools.product(range(COTS), range(FIRST if in_order else 1)))
    leaf = theta.clone().requires_grad_()
    cot, first, _ = (x.detach().exp() for x in tables(theta, in_order))
    totals = Totals(groups=1, trajectories=2, tokens=4)
    expected = torch.zeros(())
    for pair in itertools.product(responses, repeat=2):
        probability = math.prod(float(cot[c] * (first[c, s] if in_order else 1)) for c, s in pair)
        loss, _ = objective(batch(leaf, list(pair), in_order, labelled), totals)
        expected = expected + probability * loss
    (gradient,) = torch.autograd.grad(expected, leaf)
    for i in range(theta.numel()):
        e = torch.zeros_like(theta)
        e[i] = 1e-5
        difference = (exact(theta + e, in_order, labelled) - exact(theta - e, in_order, labelled)) / 2e-5
        torch.testing.assert_close(-gradient[i], difference, **TOLERANCE)


def some(labelled: tuple[bool, bool] = (True, True)) -> ScoredBatch:
    theta = torch.randn(COTS * (1 + FIRST * (1 + SECOND)), generator=torch.Generator().manual_seed(2)).double()
    return batch(theta, [(0, 0), (1, 1), (2, 2), (1, 0)], True, labelled)


def test_separate_advantages_are_normalised_by_aspect() -> None:
    """A wide aspect does not drown a narrow one (as in GDPO); together they are normalised as one reward."""
    scored = some()
    r = torch.stack([reward(own.score_logprobs, a) for a, (_, own) in enumerate(scored.parts())], 1)
    share = torch.tensor([0.25, 0.75], dtype=torch.float64)
    config = {"std_normalize": True, "beta": 0.0, "lam": 0.5, "baseline": "group_mean"}

    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-6)

    together = build_objective(ObjectiveConfig(**config)).advantages(scored)
    torch.testing.assert_close(together, normalised(r @ share), **TOLERANCE)
    separate = build_objective(ObjectiveConfig(**config, aspect_advantages="separate")).advantages(scored)
    torch.testing.assert_close(separate, normalised(r) @ share, **TOLERANCE)
    assert not torch.allclose(together, separate)
    plain = [
        build_objective(ObjectiveConfig(aspect_advantages=how)).advantages(scored) for how in ("together", "separate")
    ]
    torch.testing.assert_close(*plain, **TOLERANCE)


def test_a_response_without_an_answer_is_worse_than_each_aspects_worst() -> None:
    scored = replace(some(), has_answer=torch.tensor([True, True, False, True]))
    rewards = build_objective(ObjectiveConfig(lam=0.5)).rewards(scored)
    answered = torch.tensor([True, True, False, True])
    worst = [reward(own.score_logprobs, a)[answered].min() for a, (_, own) in enumerate(scored.parts())]
    # A squared step of each scale: 1, and (4 / 2)².
    assert float(rewards[2]) == pytest.approx(float(0.25 * (worst[0] - 1) + 0.75 * (worst[1] - 4)))


def test_metrics_are_of_each_aspect_and_of_all_labelled_scores() -> None:
    scored, missing = some(), some((True, False))
    totals = Totals(groups=1, trajectories=4, tokens=8)
    _, sums = build_objective(ObjectiveConfig())(scored, totals)
    found = summarize(sums)
    errors = []
    for a, (aspect, (_, own)) in enumerate(zip(ASPECTS, scored.parts(), strict=True)):
        error = own.score_logprobs[:, : len(aspect.values)].exp() @ own.values - LABELS[a]
        assert found[f"{aspect.name}/squared_error"] == pytest.approx(float((error**2).mean()))
        errors.append(error)
    assert found["squared_error"] == pytest.approx(float((torch.cat(errors) ** 2).mean()))
    _, sums = build_objective(ObjectiveConfig())(missing, totals)
    alone = summarize(sums)
    assert "facts/squared_error" not in alone and alone["squared_error"] == pytest.approx(alone["tone/squared_error"])


@pytest.mark.parametrize("name", ["sft", "raft"])
def test_supervised_losses_are_means_by_weight(name: str) -> None:
    totals = Totals(groups=1, trajectories=4, tokens=8)
    objective = build_objective(ObjectiveConfig(name=name))
    whole, _ = objective(some(), totals)
    parts = [objective(own, totals)[0] for _, own in some().parts()]
    torch.testing.assert_close(whole, 0.25 * parts[0] + 0.75 * parts[1], **TOLERANCE)
    alone, _ = objective(some((False, True)), totals)
    torch.testing.assert_close(alone, parts[1], **TOLERANCE)


def test_shares_are_over_what_each_response_has_labels_of() -> None:
    labels = torch.tensor([[1.0, 0.0], [1.0, math.nan], [math.nan, 4.0], [2.0, 1.0]]).double()
    shares = torch.stack([share for share, _ in replace(some(), labels=labels).parts()], 1)
    assert shares.tolist() == [[0.25, 0.75], [1.0, 0.0], [0.0, 1.0], [0.25, 0.75]]


def test_a_batch_says_what_is_wrong_with_its_labels() -> None:
    scored = some()
    with pytest.raises(ValueError, match=r"labels has shape \(4,\), expected \(4, 2\)"):
        replace(scored, labels=scored.labels[:, 0]).validate()
    with pytest.raises(FloatingPointError, match="labels"):
        some((False, False)).validate()

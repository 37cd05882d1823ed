"""The composed reinforcement-learning objective: splitting, special responses, errors, metrics.

Splits change only the order of float64 sums: tolerance 1e-12.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from real_megatron.config import ObjectiveConfig
from real_megatron.objective import ResponseView, ScoredBatch, Totals, build_objective, merge, summarize
from real_megatron.objective.rewards import LOGPROB_FLOOR

Batch = Callable[..., ScoredBatch]
TotalsOf = Callable[[ScoredBatch], Totals]
EXACT = {"rtol": 0, "atol": 1e-12}

VARIANTS: dict[str, dict] = {
    "paper": {},
    "authors": {"std_normalize": True, "clamp": 1.0, "token_mean": True, "beta": 0.5},
    "floor": {"no_anchor_reward": -8.0},
    "kl": {"kl": 0.1, "probabilities": "renormalized", "lam": 0.0},
    "ppo": {"ratio": "ppo", "kl": 0.1},
    "sequence-is": {"ratio": "truncated_is", "is_level": "sequence"},
    "token-is": {"ratio": "truncated_is", "is_level": "token", "token_mean": True},
    "no-term1": {"term1": False},
    "no-term2": {"beta": 0.0},
    "grpo": {"name": "grpo"},
    "jepo": {"name": "jepo"},
    "rloo": {"name": "rloo"},
}
TEXT_REWARD = {"reward": "tests.support.extension_reward:brief_and_weighted"}


def build(probabilities: str = "full", **settings: object):  # noqa: ANN201
    return build_objective(ObjectiveConfig(**settings), probabilities)


def micro_batch(scored: ScoredBatch, trajectories: list[int], advantages: Tensor | None = None) -> ScoredBatch:
    """The micro-batch of some trajectories, in the graph of the whole batch."""
    keep = torch.tensor(trajectories)
    rows = torch.cat([(scored.token_trajectory == i).nonzero()[:, 0] for i in trajectories])
    index = torch.full((scored.size,), -1)
    index[keep] = torch.arange(len(keep))
    _, group = scored.group[keep].unique_consecutive(return_inverse=True)
    return ScoredBatch(
        token_logprobs=scored.token_logprobs[rows],
        token_trajectory=index[scored.token_trajectory[rows]],
        score_logprobs=scored.score_logprobs[keep],
        has_answer=scored.has_answer[keep],
        labels=scored.labels[keep],
        group=group,
        values=scored.values,
        old_logprobs=scored.old_logprobs[rows],
        ref_logprobs=scored.ref_logprobs[rows],
        advantages=None if advantages is None else advantages[keep],
        responses=None if scored.responses is None else [scored.responses[i] for i in trajectories],
        sampled=scored.sampled[keep],
    )


def contributions(objective, micro_batches: list[ScoredBatch], totals: Totals, scored: ScoredBatch):  # noqa: ANN001, ANN201
    """Summed loss and gradients, and merged metrics, of micro-batches."""
    results = [objective(micro_batch, totals) for micro_batch in micro_batches]
    loss = sum(loss for loss, _ in results)
    gradients = torch.autograd.grad(loss, (scored.token_logprobs, scored.score_logprobs))
    return loss.detach(), gradients, merge([metrics for _, metrics in results])


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_of_whole_groups_add_up_to_the_batch(variant: str, batch: Batch, totals: TotalsOf) -> None:
    objective, scored = build(**VARIANTS[variant]), batch()
    whole = contributions(objective, [scored], totals(scored), scored)
    micro_batches = [micro_batch(scored, [3, 4]), micro_batch(scored, [0, 1, 2]), micro_batch(scored, [5, 6, 7, 8])]
    split = contributions(objective, micro_batches, totals(scored), scored)
    assert whole[1][0].any() or variant == "no-term1"
    torch.testing.assert_close(split, whole, **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_groups_with_precomputed_advantages_add_up_too(variant: str, batch: Batch, totals: TotalsOf) -> None:
    objective, scored = build(**VARIANTS[variant]), batch()
    whole = contributions(objective, [scored], totals(scored), scored)
    advantages = objective.advantages(scored)
    assert not advantages.requires_grad
    micro_batches = [micro_batch(scored, list(range(i, min(i + 2, 9))), advantages) for i in range(0, 9, 2)]
    split = contributions(objective, micro_batches, totals(scored), scored)
    torch.testing.assert_close(split, whole, **EXACT)


def test_precomputed_advantages_are_used_as_they_are(batch: Batch, totals: TotalsOf) -> None:
    """Neither normalised, clamped nor centred once more; Term 2 does not look at them."""
    scored = batch()
    scored.advantages = torch.linspace(-7, 9, 9, dtype=torch.float64)
    objective = build(std_normalize=True, clamp=1.0, beta=2.0)
    loss, _ = objective(scored, totals(scored))
    d_tokens, d_scores = torch.autograd.grad(loss, (scored.token_logprobs, scored.score_logprobs))
    torch.testing.assert_close(d_tokens, -scored.advantages[scored.token_trajectory] / 9, **EXACT)
    _, (_, plain), _ = contributions(build(beta=2.0), [replace(scored, advantages=None)], totals(scored), scored)
    torch.testing.assert_close(d_scores, plain, **EXACT)


def test_every_token_of_a_response_carries_its_advantage_and_no_other(batch: Batch, totals: TotalsOf) -> None:
    """The first and the last token of each response included: no slice is off by one."""
    objective, scored = build(), batch()
    _, (d_tokens, _), _ = contributions(objective, [scored], totals(scored), scored)
    advantages = objective.advantages(scored)
    assert d_tokens.tolist() == pytest.approx([-float(advantages[i]) / 9 for i in scored.token_trajectory])


def test_one_source_of_reward_is_normalised_and_clamped_once(batch: Batch, totals: TotalsOf) -> None:
    """−(ŷ−y*)² and λ log π(y*) are added first; normalising each by itself would weigh them anew in each group."""
    scored = batch(sizes=(4, 4), invalid=())
    prediction = scored.score_logprobs.detach().exp() @ scored.values
    nearest = scored.labels.round().long() - 1
    r = -((prediction - scored.labels) ** 2) + 0.5 * scored.score_logprobs.detach().gather(1, nearest[:, None])[:, 0]
    want = torch.cat([((x - x.mean()) * 4 / 3 / (x.std() + 1e-6)).clamp(-1, 1) for x in r.split(4)])
    _, (d_tokens, _), pairs = contributions(
        build(lam=0.5, std_normalize=True, clamp=1.0), [scored], totals(scored), scored
    )
    torch.testing.assert_close(d_tokens, -want[scored.token_trajectory] / 8, **EXACT)
    torch.testing.assert_close(pairs["reward"], torch.stack([r.sum(), torch.tensor(8.0).double()]), **EXACT)


def test_term_2_weighs_the_same_at_any_response_length(batch: Batch, totals: TotalsOf) -> None:
    """With β on a token and a token mean over it, long CoTs would refine their prediction less."""
    expected = {"name": "rloo", "reward": "binary_expected", "token_mean": True}
    for settings in ({}, {"token_mean": True}, {"ratio": "ppo"}, expected):
        gradients = []
        for lengths in (1, 40):
            scored = batch(lengths=lengths, seed=5)
            other = batch(seed=1)
            scored.score_logprobs, scored.labels = other.score_logprobs, other.labels
            gradients.append(contributions(build(**settings), [scored], totals(scored), scored)[1][1])
        assert gradients[0].any()
        torch.testing.assert_close(*gradients, **EXACT)


def test_term_1_and_beta_keep_their_balance_in_the_reported_losses(batch: Batch, totals: TotalsOf) -> None:
    scored = batch(invalid=())
    _, metrics = build(beta=0.5, kl=0.2)(scored, totals(scored))
    numbers = summarize(metrics)
    assert numbers["loss"] == pytest.approx(numbers["loss_term1"] + numbers["loss_term2"] + numbers["loss_kl"])
    assert numbers["loss_term2"] == pytest.approx(-0.5 * numbers["reward"])


def test_truncated_responses_are_punished_and_not_trained_as_answers(batch: Batch, totals: TotalsOf) -> None:
    scored = batch(sizes=(4,), invalid=(2,))
    garbage = scored.score_logprobs.detach().clone()
    garbage[2] = float("nan")
    scored.score_logprobs = garbage.requires_grad_()
    objective = build()
    rewards = objective.rewards(scored)
    # One squared step of the scale, 1, below the worst answer: the group's spread, and not the scale's, sets the size.
    assert float(rewards[2]) == pytest.approx(float(rewards[[0, 1, 3]].min()) - 1.0)
    loss, (d_tokens, d_scores), pairs = contributions(objective, [scored], totals(scored), scored)
    assert (
        math.isfinite(loss)
        and d_scores[2].tolist() == [0] * 5
        and torch.isfinite(d_scores).all()
        and d_scores[[0, 1, 3]].all()
    )
    # Its tokens become less likely, and its reward is part of the others' baseline.
    tokens = scored.token_trajectory == 2
    assert tokens.any() and (d_tokens[tokens] > 0).all()
    advantages = objective.advantages(scored)
    assert float(advantages[0]) == pytest.approx(float(rewards[0] - rewards[1:].mean()))
    assert summarize(pairs)["valid"] == pytest.approx(0.75)
    assert summarize(pairs)["reward"] == pytest.approx(float(rewards[[0, 1, 3]].mean()))
    assert summarize(pairs)["rewards/p50"] == pytest.approx(float(rewards[[0, 1, 3]].median()))
    assert float(build(no_anchor_reward=-9.0).rewards(scored)[2]) == -9.0
    # Without a comparison there is no worst answer of a group.
    assert float(build(baseline="none").rewards(scored)[2]) == pytest.approx(-25 + LOGPROB_FLOOR)
    answered = garbage.detach()[[0, 1, 3]].gather(1, (scored.labels[:3] - 0.01).round().long()[:, None] - 1)
    assert float(build(name="jepo").rewards(scored)[2]) == pytest.approx(float(answered.min()) - 1.0)
    # A reward with a lowest value: no answer is as good as a wrong one.
    assert float(build(name="rloo", reward="binary_expected").rewards(scored)[2]) == 0.0


def test_a_batch_without_a_single_answer_still_learns_to_give_one_and_runs_backward(
    batch: Batch, totals: TotalsOf
) -> None:
    scored = batch(sizes=(2, 2), invalid=(0, 1, 2, 3))
    _, (d_tokens, d_scores), _ = contributions(build(), [scored], totals(scored), scored)
    assert not d_tokens.any() and not d_scores.any()
    contributions(build(term1=False), [scored], totals(scored), scored)
    contributions(build(beta=0.0), [scored], totals(scored), scored)


@pytest.mark.parametrize("settings", [*VARIANTS.values(), TEXT_REWARD], ids=[*VARIANTS, "text"])
def test_a_micro_batch_of_padding_alone_contributes_zero(settings: dict, batch: Batch) -> None:
    full = batch()
    names = ("has_answer", "labels", "group", "sampled")
    empty = replace(micro_batch(full, [0]), **{name: getattr(full, name)[:0] for name in names})
    empty = replace(
        empty,
        token_logprobs=full.token_logprobs[:0],
        token_trajectory=full.token_trajectory[:0],
        score_logprobs=full.score_logprobs[:0],
        old_logprobs=None,
        ref_logprobs=None,
    )
    loss, metrics = build(**settings)(empty, Totals(3, 9, 20))
    assert loss.item() == 0 and loss.requires_grad
    assert not any(bool(value.any()) for value in metrics.values())


def test_a_missing_reference_is_an_error_and_never_a_zero(batch: Batch, totals: TotalsOf) -> None:
    objective, scored = build(kl=0.1), batch()
    assert objective.needs_ref_logprobs and not build().needs_ref_logprobs
    assert summarize(objective(scored, totals(scored))[1])["kl"] > 0.01
    with pytest.raises(ValueError, match="objective.kl is above 0 but the batch has no log-probabilities"):
        objective(replace(scored, ref_logprobs=None), totals(scored))


@pytest.mark.parametrize("ratio", ["ppo", "truncated_is"])
def test_a_ratio_without_the_samplers_log_probabilities_is_an_error(ratio: str, batch: Batch, totals: TotalsOf) -> None:
    objective, scored = build(ratio=ratio), replace(batch(), old_logprobs=None)
    assert objective.needs_old_logprobs and not build().needs_old_logprobs
    with pytest.raises(ValueError, match=f"objective.ratio is '{ratio}' but the batch has no log-probabilities"):
        objective(scored, totals(scored))


def test_values_that_are_not_finite_are_refused(batch: Batch, totals: TotalsOf) -> None:
    scored = batch()
    scored.token_logprobs.data[3] = float("nan")
    for call in (lambda: build()(scored, totals(scored)), lambda: build().rewards(scored)):
        with pytest.raises(FloatingPointError, match="NaN or infinite values in token_logprobs"):
            call()


def test_a_single_response_needs_another_baseline(batch: Batch, totals: TotalsOf) -> None:
    scored = batch(sizes=(1, 2), invalid=())
    with pytest.raises(ValueError, match="a group holds a single response"):
        build()(scored, totals(scored))
    for settings in ({"baseline": "none"}, {"term1": False}):
        assert not build(**settings).needs_advantages
        build(**settings)(scored, totals(scored))
    assert build().needs_advantages
    build()(replace(scored, advantages=torch.zeros(3, dtype=torch.float64)), totals(scored))


def test_presets_are_the_published_combinations(batch: Batch, totals: TotalsOf) -> None:
    scored = batch(invalid=())
    p = scored.score_logprobs.detach().gather(1, (scored.labels - 0.01).round().long()[:, None] - 1)[:, 0]
    torch.testing.assert_close(build(name="jepo").rewards(scored), p, **EXACT)
    expected = build(name="rloo", reward="binary_expected")
    torch.testing.assert_close(expected.rewards(scored), p.exp(), **EXACT)
    hit = (scored.sampled == (scored.labels - 0.01).round().long() - 1).double()
    assert 0 < hit.sum() < 9
    for name in ("rloo", "grpo"):
        torch.testing.assert_close(build(name=name).rewards(scored), hit, **EXACT)
    rewards = build(name="grpo").rewards(scored)
    want = torch.cat([(r - r.mean()) / (r.std() + 1e-6) for r in rewards.split([3, 2, 4])])
    torch.testing.assert_close(build(name="grpo").advantages(scored), want, **EXACT)
    assert build(name="grpo").ratio == "ppo" and build(name="rloo").ratio == "none"


def test_metrics_by_hand(batch: Batch, totals: TotalsOf) -> None:
    scored = batch()
    objective = build(ratio="ppo", kl=0.1)
    numbers = summarize(objective(scored, totals(scored))[1])
    has, logp = scored.has_answer, scored.score_logprobs.detach()[scored.has_answer]
    error = logp.exp() @ scored.values - scored.labels[has]
    advantages = objective.advantages(scored)
    ratio = (scored.token_logprobs.detach() - scored.old_logprobs).exp()
    a = advantages[scored.token_trajectory]
    clipped = torch.where(a > 0, ratio > 1.2, ratio < 0.8).double()
    q = logp.softmax(-1)
    log_ratio = scored.ref_logprobs - scored.token_logprobs.detach()
    k3 = log_ratio.exp() - 1 - log_ratio
    nearest = (scored.values - scored.labels[has][:, None]).abs().argmin(1)
    correct = (logp.argmax(1) == nearest).double()
    want = {
        "reward": objective.rewards(scored)[has].mean(),
        "squared_error": (error**2).mean(),
        "absolute_error": error.abs().mean(),
        "expected_score": (logp.exp() @ scored.values).mean(),
        "score_mass": logp.exp().sum(-1).mean(),
        "accuracy": correct.mean(),
        "label_logprob": logp[range(8), nearest].mean(),
        "score_entropy": -(q * q.log()).sum(-1).mean(),
        "valid": 8 / 9,
        "response_tokens": len(ratio) / 9,
        "advantage": advantages.mean(),
        "advantage_abs": advantages.abs().mean(),
        "advantage_std": advantages.std(unbiased=False),
        "ratio": ratio.mean(),
        "clip_fraction": clipped.mean(),
        "loss_term1": -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / 9,
        "loss_term2": -objective.rewards(scored)[has].sum() / 9,
        "kl": k3.mean(),
        "loss_kl": 0.1 * k3.sum() / 9,
        "mismatch/mean": ratio.log().abs().mean(),
        "mismatch/max": ratio.log().abs().max(),
    }
    assert 0 < float(clipped.mean()) < 1 and 0 < float(correct.mean()) < 1
    assert {name: numbers[name] for name in want} == pytest.approx({k: float(v) for k, v in want.items()}, abs=1e-12)
    assert all(math.isfinite(x) for x in numbers.values())


def test_float32_inputs_give_float32_losses_and_gradients(batch: Batch, totals: TotalsOf) -> None:
    scored = batch()
    want = contributions(build(ratio="truncated_is", is_level="sequence", kl=0.1), [scored], totals(scored), scored)
    names = ("token_logprobs", "score_logprobs", "labels", "values", "old_logprobs", "ref_logprobs")
    single = replace(scored, **{name: getattr(scored, name).detach().float() for name in names})
    single.token_logprobs.requires_grad_()
    single.score_logprobs.requires_grad_()
    got = contributions(build(ratio="truncated_is", is_level="sequence", kl=0.1), [single], totals(single), single)
    assert got[0].dtype == got[1][0].dtype == got[1][1].dtype == torch.float32
    # float32 rounding of rewards of order 30
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5, check_dtype=False)


def test_a_reward_of_text_and_metadata_moves_the_right_responses(batch: Batch, totals: TotalsOf) -> None:
    """Whole and in micro-batches; the words of response 3 change its own reward and its group's baseline alone."""
    objective = build(**TEXT_REWARD)
    views = [ResponseView(f"{'word ' * i}", {"weight": 1.0 + i}) for i in range(9)]
    scored = replace(batch(), responses=views)
    error = (scored.score_logprobs.detach().exp() @ scored.values - scored.labels).abs()
    count = torch.arange(9, dtype=torch.float64)
    want = torch.where(scored.has_answer, -(1 + count) * error - 0.1 * count, -6.0)
    rewards = objective.rewards(scored)
    torch.testing.assert_close(rewards, want, **EXACT)

    whole = contributions(objective, [scored], totals(scored), scored)
    micro_batches = [micro_batch(scored, [3, 4]), micro_batch(scored, [0, 1, 2]), micro_batch(scored, [5, 6, 7, 8])]
    torch.testing.assert_close(contributions(objective, micro_batches, totals(scored), scored), whole, **EXACT)
    d_tokens, d_scores = whole[1]
    assert d_scores[scored.has_answer].all(), "Term 2 differentiates the reward that reads responses"

    longer = [*views[:3], ResponseView("word " * 13, views[3].meta), *views[4:]]
    changed = replace(scored, responses=longer)
    moved = objective.rewards(changed) - rewards
    torch.testing.assert_close(moved, torch.tensor([0, 0, 0, -1.0, 0, 0, 0, 0, 0]).double(), **EXACT)
    _, (d_changed, _), _ = contributions(objective, [changed], totals(scored), scored)
    other = scored.group[scored.token_trajectory] != scored.group[3]
    assert torch.equal(d_changed[other], d_tokens[other]) and (d_changed[~other] != d_tokens[~other]).all()


def test_a_sampled_score_is_trained_as_a_token_and_not_through_its_distribution(batch: Batch, totals: TotalsOf) -> None:
    scored = batch()
    for name in ("rloo", "grpo"):
        objective = build(name=name)
        assert objective.needs_sampled_scores and not build(name=name, reward="binary_expected").needs_sampled_scores
        _, (d_tokens, d_scores), pairs = contributions(objective, [scored], totals(scored), scored)
        assert d_tokens.any() and not d_scores.any() and "loss_term2" not in pairs
        with pytest.raises(ValueError, match="the reward needs sampled scores"):
            objective(replace(scored, sampled=None), totals(scored))


def test_a_reward_of_text_needs_responses(batch: Batch, totals: TotalsOf) -> None:
    objective, scored = build(**TEXT_REWARD), batch()
    for call in (lambda: objective(scored, totals(scored)), lambda: objective.rewards(scored)):
        with pytest.raises(ValueError, match="the reward reads responses, but the batch has none"):
            call()

"""Supervised objectives by hand. Their gradients are in test_closed_form.py."""

from collections.abc import Callable

import pytest
import torch

from real_megatron.config import ObjectiveConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective, summarize

Batch = Callable[..., ScoredBatch]


def hand_batch() -> ScoredBatch:
    return ScoredBatch(
        token_logprobs=torch.tensor([-1.0, -2.0, -0.5], requires_grad=True),
        token_trajectory=torch.tensor([0, 0, 1]),
        score_logprobs=torch.tensor([[0.1, 0.2, 0.5], [0.25, 0.25, 0.25]]).log().requires_grad_(),
        has_answer=torch.tensor([True, True]),
        labels=torch.tensor([4.0, 1.8]),
        group=torch.tensor([0, 1]),
        values=torch.tensor([1.0, 2.0, 4.0]),
    )


def test_by_hand() -> None:
    """Three tokens and two score tokens: NLL (3.5 + log 2 + log 4) / 5, or of tokens alone 3.5 / 3, as raft and tract
    have it; ŷ = 2.5 and 1.75."""
    totals = Totals(2, 2, 3)
    with_score, tokens_alone = (3.5 + 3 * torch.tensor(2.0).log().item()) / 5, 3.5 / 3
    squared = (1.5**2 + 0.05**2) / 2
    for config, nll, lam, weight in (
        (ObjectiveConfig(name="sft"), with_score, 1.0, 0.0),
        (ObjectiveConfig(name="raft"), tokens_alone, 1.0, 1.0),
        (ObjectiveConfig(name="tract", lam=0.25), tokens_alone, 0.25, 1.0),
        (ObjectiveConfig(name="tract", score_nll=True, lam=0.25), with_score, 0.25, 1.0),
        (ObjectiveConfig(name="raft", lam=0.0), tokens_alone, 0.0, 1.0),
    ):
        want = lam * nll + weight * squared
        loss, metrics = build_objective(config)(hand_batch(), totals)
        assert loss.item() == pytest.approx(want, rel=1e-6)
        numbers = summarize(metrics)
        assert numbers["loss"] == pytest.approx(want, rel=1e-6) and numbers["nll"] == pytest.approx(nll, rel=1e-6)
        assert numbers["squared_error"] == pytest.approx(squared, rel=1e-6)
        assert numbers["loss_nll"] == pytest.approx(lam * nll, rel=1e-6)
        assert numbers["loss_squared"] == pytest.approx(weight * squared, rel=1e-6)


def test_lam_is_a_weight_of_raft_and_tract_alone() -> None:
    totals = Totals(2, 2, 3)
    a, _ = build_objective(ObjectiveConfig(name="sft", lam=0.1))(hand_batch(), totals)
    b, _ = build_objective(ObjectiveConfig(name="sft"))(hand_batch(), totals)
    assert a.item() == b.item()


@pytest.mark.parametrize("name", ["sft", "raft", "tract"])
def test_micro_batches_add_up(name: str, batch: Batch) -> None:
    """Only the order of float64 sums differs: tolerance 1e-12."""
    scored, objective = batch(sizes=(1,) * 6, invalid=()), build_objective(ObjectiveConfig(name=name, lam=0.3))
    totals = Totals(6, 6, float(scored.token_logprobs.numel()))
    leaves = (scored.token_logprobs, scored.score_logprobs)
    loss, metrics = objective(scored, totals)
    want = torch.autograd.grad(loss, leaves)
    got, pairs = torch.zeros((), dtype=torch.float64), {}
    for keep in ([4, 5], [0], [], [1, 2, 3]):
        index = torch.tensor(keep, dtype=torch.long)
        rows = torch.isin(scored.token_trajectory, index)
        micro = ScoredBatch(
            token_logprobs=scored.token_logprobs[rows],
            token_trajectory=scored.token_trajectory[rows] - (keep[0] if keep else 0),
            score_logprobs=scored.score_logprobs[index],
            has_answer=scored.has_answer[index],
            labels=scored.labels[index],
            group=torch.arange(len(keep)),
            values=scored.values,
        )
        contribution, theirs = objective(micro, totals)
        got = got + contribution
        pairs = {k: pairs.get(k, 0) + v for k, v in theirs.items()}
    torch.testing.assert_close(got, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, leaves), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs, metrics, rtol=0, atol=1e-12)


def test_a_target_without_a_score_is_refused(batch: Batch) -> None:
    objective = build_objective(ObjectiveConfig(name="sft"))
    assert not (objective.needs_advantages or objective.needs_old_logprobs or objective.needs_ref_logprobs)
    assert not objective.needs_responses
    with pytest.raises(ValueError, match=r"trajectories \[1, 4\] have no score anchor"):
        objective(batch(invalid=(1, 4)), Totals(3, 9, 20))

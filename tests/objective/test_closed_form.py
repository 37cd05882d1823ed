"""float64 autograd through the objectives against gradients derived by hand, with respect to logits.

With p = softmax(z) over the whole vocabulary, 1_v an indicator and K the scores (ids 0..4):
    ∂ŷ/∂z_v             = p_v (v_v 1[v ∈ K] − ŷ)                 full
                        = q_v (v_v − ŷ) 1[v ∈ K]                 renormalised, q = p / Σ_K p
    ∂log π(y*)/∂z_v     = 1[v = y*] − p_v
    ∂log π(token)/∂z_v  = 1[v = token] − p_v
Both sides are a few float64 operations on numbers of order 1 to 100: tolerance 1e-12.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from real_megatron.config import ObjectiveConfig
from real_megatron.objective import ScoredBatch, Totals, build_objective

N, SCORES, VOCABULARY, LENGTH = 6, 5, 8, 3
VALUES = torch.arange(1.0, 6.0, dtype=torch.float64)
LABELS = torch.tensor([1.0, 1.0, 3.6, 3.6, 5.0, 5.0], dtype=torch.float64)
NEAREST = torch.tensor([0, 0, 3, 3, 4, 4])
VALID = torch.tensor([1, 1, 1, 0, 1, 1]).bool()
TOLERANCE = {"rtol": 0, "atol": 1e-12}


class Case:
    """Logits, the batch that follows from them, and the terms of the gradients derived by hand."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(3)
        self.answer_logits = torch.randn(N, VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()
        self.token_logits = torch.randn(N * LENGTH, VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()
        self.tokens = torch.randint(0, VOCABULARY, (N * LENGTH,), generator=g)
        self.trajectory = torch.arange(N).repeat_interleave(LENGTH)
        logp = torch.log_softmax(self.token_logits, -1).gather(1, self.tokens[:, None])[:, 0]
        noise = torch.randn(2, N * LENGTH, generator=g, dtype=torch.float64)
        self.scored = ScoredBatch(
            token_logprobs=logp,
            token_trajectory=self.trajectory,
            score_logprobs=torch.log_softmax(self.answer_logits, -1)[:, :SCORES],
            has_answer=VALID,
            labels=LABELS,
            group=torch.tensor([0, 0, 1, 1, 2, 2]),
            values=VALUES,
            old_logprobs=logp.detach() + 0.4 * noise[0],
            ref_logprobs=logp.detach() + 0.4 * noise[1],
        )
        self.totals = Totals(3, N, N * LENGTH)
        self.p = self.answer_logits.detach().softmax(-1)
        self.values = torch.cat([VALUES, torch.zeros(VOCABULARY - SCORES, dtype=torch.float64)])
        self.one_label = torch.nn.functional.one_hot(NEAREST, VOCABULARY).double()
        self.d_label = self.one_label - self.p
        one_token = torch.nn.functional.one_hot(self.tokens, VOCABULARY).double()
        self.d_token = one_token - self.token_logits.detach().softmax(-1)

    def prediction(self, probabilities: str) -> tuple[Tensor, Tensor]:
        """ŷ [N] and ∂ŷ/∂z [N, V]."""
        q = self.p
        if probabilities == "renormalized":
            q = torch.cat([q[:, :SCORES], torch.zeros(N, VOCABULARY - SCORES, dtype=torch.float64)], 1)
            q = q / q.sum(1, keepdim=True)
        y = q @ self.values
        return y, q * (self.values - y[:, None])

    def gradients(self, probabilities: str = "full", **settings: object) -> tuple[Tensor, Tensor]:
        """Autograd's ∂loss/∂z of tokens and of answers."""
        loss, _ = build_objective(ObjectiveConfig(**settings), probabilities)(self.scored, self.totals)
        return torch.autograd.grad(loss, (self.token_logits, self.answer_logits), retain_graph=True)


@pytest.fixture
def case() -> Case:
    return Case()


def rloo(r: Tensor) -> Tensor:
    """Groups of two: each reward minus the other."""
    a = r.view(3, 2)
    return (a - a.flip(1)).flatten()


def real_reward(case: Case, lam: float, probabilities: str) -> tuple[Tensor, Tensor]:
    """r [N] with the floor at the invalid trajectory, and ∂r/∂z [N, V] with zeros there."""
    y, dy = case.prediction(probabilities)
    error = y - LABELS
    r = -(error**2) + lam * case.p.gather(1, NEAREST[:, None])[:, 0].log()
    dr = -2 * error[:, None] * dy + lam * case.d_label
    return torch.where(VALID, r, -30.0), dr * VALID[:, None]


@pytest.mark.parametrize("probabilities", ["full", "renormalized"])
@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_real(case: Case, lam: float, probabilities: str) -> None:
    d_tokens, d_answers = case.gradients(lam=lam, beta=0.3, probabilities=probabilities, no_anchor_reward=-30.0)
    r, dr = real_reward(case, lam, probabilities)
    torch.testing.assert_close(d_tokens, -rloo(r)[case.trajectory, None] * case.d_token / N, **TOLERANCE)
    torch.testing.assert_close(d_answers, -0.3 * dr / N, **TOLERANCE)


@pytest.mark.parametrize(
    ("reward", "d_reward"),
    [
        ("answer_logprob", lambda c: c.d_label),
        ("binary_expected", lambda c: c.p.gather(1, NEAREST[:, None]) * c.d_label),
    ],
)
def test_other_rewards(case: Case, reward: str, d_reward: Callable[[Case], Tensor]) -> None:
    _, d_answers = case.gradients(reward=reward)
    torch.testing.assert_close(d_answers, -d_reward(case) * VALID[:, None] / N, **TOLERANCE)


def test_the_greedy_binary_reward_has_no_term_2(case: Case) -> None:
    d_tokens, d_answers = case.gradients(name="rloo", reward="binary_greedy")
    r = (case.p[:, :SCORES].argmax(1) == NEAREST).double() * VALID
    assert 0 < r.sum() < N and not d_answers.any()
    torch.testing.assert_close(d_tokens, -rloo(r)[case.trajectory, None] * case.d_token / N, **TOLERANCE)


def test_token_mean_divides_term_1_by_tokens_and_term_2_by_responses(case: Case) -> None:
    d_tokens, d_answers = case.gradients(token_mean=True, no_anchor_reward=-30.0)
    r, dr = real_reward(case, 1.0, "full")
    want = -rloo(r)[case.trajectory, None] * case.d_token / (N * LENGTH)
    torch.testing.assert_close(d_tokens, want, **TOLERANCE)
    torch.testing.assert_close(d_answers, -dr / N, **TOLERANCE)


def test_ppo_clipping(case: Case) -> None:
    """Gradient −A ρ where unclipped; none where ρ > 1+ε with A > 0 or ρ < 1−ε with A < 0."""
    d_tokens, d_answers = case.gradients(ratio="ppo", clip=0.2, no_anchor_reward=-30.0)
    r, dr = real_reward(case, 1.0, "full")
    a = rloo(r)[case.trajectory]
    rho = (case.scored.token_logprobs.detach() - case.scored.old_logprobs).exp()
    kept = torch.where(a > 0, rho <= 1.2, rho >= 0.8)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(d_tokens, -(a * rho * kept)[:, None] * case.d_token / N, **TOLERANCE)
    torch.testing.assert_close(d_answers, -dr / N, **TOLERANCE)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_truncated_importance_weights(case: Case, level: str) -> None:
    cap = 1.1
    d_tokens, d_answers = case.gradients(ratio="truncated_is", is_level=level, is_cap=cap, no_anchor_reward=-30.0)
    r, dr = real_reward(case, 1.0, "full")
    rho = (case.scored.token_logprobs.detach() - case.scored.old_logprobs).exp()
    whole = rho.view(N, LENGTH).prod(1)
    per_token = whole[case.trajectory] if level == "sequence" else rho
    per_answer = whole.clamp(max=cap) if level == "sequence" else torch.ones(N, dtype=torch.float64)
    assert 0 < (per_token > cap).sum() < N * LENGTH
    want = -(rloo(r)[case.trajectory] * per_token.clamp(max=cap))[:, None] * case.d_token / N
    torch.testing.assert_close(d_tokens, want, **TOLERANCE)
    torch.testing.assert_close(d_answers, -per_answer[:, None] * dr / N, **TOLERANCE)

    settings = {"ratio": "truncated_is", "is_level": level, "is_cap": cap, "no_anchor_reward": -30.0}
    with_kl, _ = case.gradients(kl=0.5, **settings)
    q_over_pi = (case.scored.ref_logprobs - case.scored.token_logprobs.detach()).exp()
    d_kl = (per_token.clamp(max=cap) * (1 - q_over_pi))[:, None] * case.d_token
    torch.testing.assert_close(with_kl - want, 0.5 * d_kl / N, **TOLERANCE)


@pytest.mark.parametrize("token_mean", [False, True])
def test_kl_term(case: Case, token_mean: bool) -> None:
    """∂k3/∂z = (1 − q/π) ∂log π/∂z, averaged over responses, or with `token_mean` over tokens."""
    with_kl, _ = case.gradients(kl=0.5, token_mean=token_mean)
    without, _ = case.gradients(token_mean=token_mean)
    q_over_pi = (case.scored.ref_logprobs - case.scored.token_logprobs.detach()).exp()
    count = N * LENGTH if token_mean else N
    torch.testing.assert_close(with_kl - without, 0.5 * (1 - q_over_pi)[:, None] * case.d_token / count, **TOLERANCE)


@pytest.mark.parametrize("probabilities", ["full", "renormalized"])
def test_supervised(case: Case, probabilities: str) -> None:
    case.scored.has_answer = torch.ones(N, dtype=torch.bool)
    count = N * LENGTH + N
    y, dy = case.prediction(probabilities)
    squared = 2 * (y - LABELS)[:, None] * dy / N

    d_tokens, d_answers = case.gradients(name="sft")
    torch.testing.assert_close(d_tokens, -case.d_token / count, **TOLERANCE)
    torch.testing.assert_close(d_answers, -case.d_label / count, **TOLERANCE)

    for name in ("raft", "tract"):
        settings = {"name": name, "lam": 0.4, "probabilities": probabilities}
        d_tokens, d_answers = case.gradients(**settings)
        torch.testing.assert_close(d_tokens, -0.4 * case.d_token / (N * LENGTH), **TOLERANCE)
        torch.testing.assert_close(d_answers, squared, **TOLERANCE)
        d_tokens, d_answers = case.gradients(**settings, score_nll=True)
        torch.testing.assert_close(d_tokens, -0.4 * case.d_token / count, **TOLERANCE)
        torch.testing.assert_close(d_answers, squared - 0.4 * case.d_label / count, **TOLERANCE)

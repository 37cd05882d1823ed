"""The reinforcement-learning objective: REAL, and with another reward or advantage RLOO, GRPO and JEPO."""

from dataclasses import dataclass

import torch
from torch import Tensor

from real_megatron.config import AspectAdvantages, Baseline, Ratio, RatioLevel
from real_megatron.objective import policy_gradient as pg
from real_megatron.objective.advantages import advantages, minimum_group_size
from real_megatron.objective.kl import k3
from real_megatron.objective.metrics import loss_pair, pair, sample, score_metrics
from real_megatron.objective.mismatch import mismatch_metrics
from real_megatron.objective.rewards import Reward, RewardOptions, below_the_worst, compute_rewards
from real_megatron.objective.types import MetricSums, ScoredBatch, Totals


@dataclass(frozen=True)
class ReinforceObjective:
    """The generalized policy gradient of arXiv 2603.17145:

        loss = −(1/N) Σ_i [ A_i · Σ_t log π(c_{i,t}) + β · r_i(θ) ]      A_i = r_i − baseline, a constant

    over all N responses of the batch. Term 1 is the policy gradient of the CoTs, Term 2 the gradient of the rewards
    themselves. With β = 1, the baseline `rloo` or `none` and neither normalisation nor clamping, the expected gradient
    is that of −E[r], as long as the reward of a response without an answer is a constant: a margin below the worst
    answer compares it with the group, a bias where there are such responses.

    Both terms take the same rewards, computed once. A response without an answer has a constant reward, below those of
    its group or `floor`: it takes part in the baseline and has no Term 2. One with a forced anchor counts like any
    other; its anchor tokens have no loss because they were not sampled. Dropped ones are not in the batch. A score that
    the reward samples is one more of the c_{i,t}. A reward without a gradient has no Term 2. With `token_mean` Term 1
    and the KL term are averaged over the batch's tokens; Term 2 is always a mean over responses, whatever their length.
    Of a response with several aspects r_i is the mean of their rewards by weight, over those that have a label.
    """

    reward: Reward
    options: RewardOptions = RewardOptions()
    beta: float = 1.0
    term1: bool = True
    baseline: Baseline = "rloo"
    std_normalize: bool = False
    clamp: float | None = None
    token_mean: bool = False
    kl: float = 0.0
    ratio: Ratio = "none"
    clip: float = 0.2
    is_cap: float = 2.0
    is_level: RatioLevel = "token"
    """`sequence`: a response's weight π(c)/μ(c) multiplies all its terms; `token`: each token's own, not Term 2."""
    aspect_advantages: AspectAdvantages = "together"
    """`together`: advantages of the weighted mean of the aspects' rewards; `separate`: the weighted mean of each
    aspect's advantages, with its own normalisation and clamping."""
    floor: float | None = None
    """Reward of a response without an answer; None: the reward's margin below the worst answer of its group, or where
    it has none, or responses are not compared, the reward's own floor."""

    @property
    def needs_advantages(self) -> bool:
        """Responses of a group are compared with each other: Term 1 with a baseline."""
        return self.term1 and minimum_group_size(self.baseline, self.std_normalize) > 1

    @property
    def needs_old_logprobs(self) -> bool:
        """`ScoredBatch.old_logprobs` must be given."""
        return self.ratio != "none"

    @property
    def needs_ref_logprobs(self) -> bool:
        """`ScoredBatch.ref_logprobs` must be given."""
        return self.kl > 0

    @property
    def needs_responses(self) -> bool:
        """`ScoredBatch.responses` must be given."""
        return self.reward.reads_responses

    @property
    def needs_sampled_scores(self) -> bool:
        """`ScoredBatch.sampled` must be given: responses end with a score token that was sampled."""
        return self.reward.samples_score

    def rewards(self, scored: ScoredBatch) -> Tensor:
        """[N] rewards of whole groups, without gradient, as advantages compare them."""
        scored.validate()
        with torch.no_grad():
            return _total([(share, self._compared(r, own)) for share, r, own in self._parts(scored)])

    def advantages(self, scored: ScoredBatch) -> Tensor:
        """[N] advantages of whole groups, without gradient: the scoring pass of groups that are split over
        micro-batches."""
        scored.validate()
        with torch.no_grad():
            return self._advantages(self._parts(scored))

    def _parts(self, scored: ScoredBatch) -> list[tuple[Tensor, Tensor, ScoredBatch]]:
        """Of each aspect its share [N], its rewards [N] with gradient, and the batch of it alone."""
        return [
            (
                share,
                compute_rewards(
                    self.reward,
                    own.score_logprobs,
                    own.has_answer,
                    own.values,
                    own.labels,
                    self.options,
                    self.floor,
                    own.responses,
                    own.sampled,
                ),
                own,
            )
            for share, own in scored.parts()
        ]

    def _advantages(self, parts: list[tuple[Tensor, Tensor, ScoredBatch]]) -> Tensor:
        compared = [(share, self._compared(r, own)) for share, r, own in parts]
        group = parts[0][2].group
        if self.aspect_advantages == "separate":
            return _total([(share, self._centred(r, group)) for share, r in compared])
        return self._centred(_total(compared), group)

    def _centred(self, rewards: Tensor, group: Tensor) -> Tensor:
        return advantages(rewards, group, baseline=self.baseline, std_normalize=self.std_normalize, clamp=self.clamp)

    def _compared(self, rewards: Tensor, scored: ScoredBatch) -> Tensor:
        margin = self.reward.margin
        if self.floor is not None or margin is None or minimum_group_size(self.baseline, self.std_normalize) < 2:
            return rewards.detach()
        return below_the_worst(rewards.detach(), scored.has_answer, scored.group, margin(scored.values, self.options))

    def __call__(self, scored: ScoredBatch, totals: Totals) -> tuple[Tensor, MetricSums]:
        """See `Objective`. Raises FloatingPointError for values that are not finite, and ValueError where log-probs or
        responses are missing or a group is too small for the baseline."""
        scored.validate()
        tokens, trajectory, n = scored.token_logprobs, scored.token_trajectory, scored.size
        per_token = 1.0 / max(totals.tokens if self.token_mean else totals.trajectories, 1.0)
        per_trajectory = 1.0 / max(totals.trajectories, 1.0)
        fraction = n * per_trajectory

        parts = self._parts(scored)
        r = _total([(share, own) for share, own, _ in parts])
        weights = pg.Weights(torch.ones_like(tokens), torch.ones_like(r), torch.zeros_like(tokens))
        if self.ratio == "truncated_is":
            weights = pg.truncated_weights(
                tokens, self._sampler_logprobs(scored), trajectory, n, self.is_level, self.is_cap
            )
        clipped = weights.clipped

        # The zeros keep both inputs in the graph when a term is off or no response is valid: backward always works.
        answers = torch.where(scored.has_answer[:, None], scored.score_logprobs, 0.0)
        loss = 0.0 * tokens.sum() + 0.0 * answers.sum()
        metrics: MetricSums = {"reward": pair(r, scored.has_answer), "rewards": sample(r, scored.has_answer)}
        metrics |= score_metrics(scored, self.options.probabilities)
        if self.term1:
            a = scored.advantages
            if a is None:
                a = self._advantages(parts)
            token_a = a.to(tokens.dtype)[trajectory]
            if self.ratio == "ppo":
                term, clipped = pg.ppo_loss(tokens, self._sampler_logprobs(scored), token_a, self.clip)
            else:
                term, _ = pg.plain_loss(tokens, token_a)
            term1 = (weights.token * term).sum() * per_token
            loss = loss + term1
            metrics |= {"loss_term1": loss_pair(term1, fraction), "advantage": pair(a), "advantage_abs": pair(a.abs())}
            metrics["advantage_square"] = pair(a**2)
        if self.beta and self.reward.has_gradient:
            answered = torch.where(scored.has_answer, r, 0.0)
            term2 = -self.beta * (weights.trajectory * answered).sum() * per_trajectory
            loss = loss + term2
            metrics["loss_term2"] = loss_pair(term2, fraction)
        if self.kl:
            divergence = k3(tokens, self._reference_logprobs(scored))
            term_kl = self.kl * (weights.token * divergence).sum() * per_token
            loss = loss + term_kl
            metrics |= {"loss_kl": loss_pair(term_kl, fraction), "kl": pair(divergence)}
        old = self._sampler_logprobs(scored) if self.needs_old_logprobs else scored.old_logprobs
        if old is not None:
            metrics |= {"ratio": pair((tokens.detach() - old).exp()), "clip_fraction": pair(clipped)}
            metrics |= mismatch_metrics(tokens, old)
        metrics["loss"] = loss_pair(loss, fraction)
        return loss, metrics

    def _sampler_logprobs(self, scored: ScoredBatch) -> Tensor:
        if scored.old_logprobs is not None:
            return scored.old_logprobs
        if scored.token_logprobs.numel():
            raise ValueError(
                f"objective.ratio is {self.ratio!r} but the batch has no log-probabilities of the sampling policy: "
                "fill ScoredBatch.old_logprobs"
            )
        return scored.token_logprobs.detach()  # a rank's padding micro-batch holds nothing

    def _reference_logprobs(self, scored: ScoredBatch) -> Tensor:
        if scored.ref_logprobs is not None:
            return scored.ref_logprobs
        if scored.token_logprobs.numel():
            raise ValueError(
                "objective.kl is above 0 but the batch has no log-probabilities of the reference policy: fill "
                "ScoredBatch.ref_logprobs"
            )
        return scored.token_logprobs.detach()


def _total(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[N] the sum of shares [N] times numbers [N]."""
    (share, numbers), *others = parts
    if not others:
        return numbers
    total = share * numbers
    for share, numbers in others:
        total = total + share * numbers
    return total

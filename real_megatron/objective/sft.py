"""Supervised objectives on given responses: SFT, and regression-aware fine-tuning (RAFT, TRACT)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from real_megatron.config import Probabilities
from real_megatron.objective.metrics import loss_pair, pair, score_metrics
from real_megatron.objective.rail import expected_score, label_logprob
from real_megatron.objective.types import MetricSums, ScoredBatch, Totals


@dataclass(frozen=True)
class SupervisedObjective:
    """loss = squared · mean_i (ŷ_i − y*_i)² + lam · mean next-token negative log-likelihood.

    The next-token mean is over all loss-carrying tokens of the batch. With `score_nll` the score token is among them:
    its log-probability comes from `score_logprobs` (the score nearest to the label), never from a token row. The
    squared error is a mean over responses. Of several aspects both are means by weight, over those with a label. SFT:
    squared = 0, lam = 1. RAFT trains on a data set's CoTs, TRACT on the model's own: the same loss on other data, both
    with `score_nll` off, as TRACT's published code has it (arXiv 2503.04381, equation 4).
    """

    squared: float = 0.0
    lam: float = 1.0
    score_nll: bool = True
    probabilities: Probabilities = "full"

    needs_advantages = False
    needs_old_logprobs = False
    needs_ref_logprobs = False
    needs_responses = False

    def __call__(self, scored: ScoredBatch, totals: Totals) -> tuple[Tensor, MetricSums]:
        """See `Objective`. Raises FloatingPointError for values that are not finite, and ValueError for responses
        without a score."""
        scored.validate()
        if not bool(scored.has_answer.all()):
            rows = (~scored.has_answer).nonzero()[:, 0].tolist()[:8]
            raise ValueError(
                f"trajectories {rows} have no score anchor: a supervised target is CoT, anchor and score; leave such "
                "examples out of the data"
            )
        nll, count = -scored.token_logprobs, totals.tokens
        squares = scored.score_logprobs.new_zeros(scored.size)
        scores = squares
        for share, own in scored.parts():
            scores = scores - share * label_logprob(own.score_logprobs, own.values, own.labels)
            error = expected_score(own.score_logprobs, own.values, self.probabilities) - own.labels
            squares = squares + share * error**2
        if self.score_nll:
            nll = torch.cat([nll, scores])
            count += totals.trajectories
        term_nll = self.lam * nll.sum() / max(count, 1.0)
        term_squared = self.squared * squares.sum() / max(totals.trajectories, 1.0)
        loss = term_nll + term_squared
        fraction = scored.size / max(totals.trajectories, 1.0)
        metrics = {"loss": loss_pair(loss, fraction), "loss_nll": loss_pair(term_nll, fraction), "nll": pair(nll)}
        metrics["loss_squared"] = loss_pair(term_squared, fraction)
        return loss, metrics | score_metrics(scored, self.probabilities)

"""Metrics as (sum, weight) pairs, maxima and whole samples, and their reduction to numbers."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from real_megatron.config import Probabilities
from real_megatron.objective.rail import expected_score, label_index, label_logprob, score_entropy, score_mass
from real_megatron.objective.types import MetricSums, ScoredBatch

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles that are logged of a sample, as `NAME/p05` and so on."""


def pair(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """[2]: the (weighted) sum of `values` [n] and the sum of the weights (default: n)."""
    values = values.detach()
    if weights is None:
        return torch.stack([values.sum(), values.new_tensor(values.numel())])
    weights = weights.to(values.dtype)
    return torch.stack([(values * weights).sum(), weights.sum()])


def maximum(values: Tensor) -> Tensor:
    """[1]: the largest of non-negative `values` [n]; 0 of none."""
    return torch.cat([values.detach(), values.new_zeros(1)]).amax(0, keepdim=True)


def sample(values: Tensor, chosen: Tensor) -> Tensor:
    """[1, m]: the values [n] where `chosen` [n] holds, each by itself; `summarize` makes percentiles of them."""
    return values.detach()[chosen][None]


def loss_pair(contribution: Tensor, fraction: float) -> Tensor:
    """[2] of a loss contribution from a micro-batch that holds `fraction` of the batch: they add up to (loss, 1)."""
    return torch.stack([contribution.detach(), contribution.new_tensor(fraction)])


def score_metrics(scored: ScoredBatch, probabilities: Probabilities) -> MetricSums:
    """How good the score distributions are.

    Means are over the responses that have an answer, as is that of the metric `reward`. Two are over all responses:
    `valid`, the fraction that has an answer, and `response_tokens`, the number of loss-carrying tokens. With aspects
    the means are over all their labelled scores, and those of one aspect are `ASPECT/NAME`.
    """
    with torch.no_grad():
        parts = [_score_metrics(own, own.has_answer & (share > 0), probabilities) for share, own in scored.parts()]
        metrics = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
        for aspect, part in zip(scored.aspects, parts, strict=False):
            metrics |= {f"{aspect.name}/{name}": value for name, value in part.items()}
        has = scored.has_answer.to(scored.score_logprobs.dtype)
        tokens = has.new_tensor([scored.token_logprobs.numel(), scored.size])
        return metrics | {"valid": pair(has), "response_tokens": tokens}


def _score_metrics(scored: ScoredBatch, has: Tensor, probabilities: Probabilities) -> MetricSums:
    """Of the trajectories for which `has` [N] holds, on one scale."""
    values, labels = scored.values, scored.labels
    logp = torch.where(has[:, None], scored.score_logprobs, 0.0)
    prediction = expected_score(logp, values, probabilities)
    error = prediction - labels
    hit = (logp.argmax(-1) == label_index(labels, values)).to(logp.dtype)
    return {
        "expected_score": pair(prediction, has),
        "squared_error": pair(error**2, has),
        "absolute_error": pair(error.abs(), has),
        "label_logprob": pair(label_logprob(logp, values, labels), has),
        "accuracy": pair(hit, has),
        "score_entropy": pair(score_entropy(logp), has),
        "score_mass": pair(score_mass(logp), has),
    }


def merge(micro_batches: Iterable[MetricSums]) -> MetricSums:
    """The metrics of several micro-batches as one: pairs are added, of maxima the largest is kept, samples are put
    together and sorted."""
    merged: MetricSums = {}
    for metrics in micro_batches:
        for name, value in metrics.items():
            known = merged.get(name)
            value = value.double()
            if value.dim() == 2:
                value = torch.cat([value] if known is None else [known, value], dim=1).sort().values
            elif known is not None:
                value = torch.maximum(known, value) if value.numel() == 1 else known + value
            merged[name] = value
    return merged


def summarize(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers from metrics that were merged over micro-batches and ranks. Pairs without weight are left out, and
    samples without values.

    `advantage_square` becomes `advantage_std`, the standard deviation over the batch, which is not a mean.
    """
    result: dict[str, float] = {}
    for name, value in metrics.items():
        if value.dim() == 2:
            if value.numel():
                levels = torch.quantile(value[0].double(), value.new_tensor(QUANTILES).double() / 100)
                result |= {f"{name}/p{q:02d}": x for q, x in zip(QUANTILES, levels.tolist(), strict=True)}
            continue
        total, weight = value.tolist() if value.numel() == 2 else (value.item(), 1.0)
        if weight != 0:
            result[name] = total / weight
    square = result.pop("advantage_square", None)
    if square is not None:
        result["advantage_std"] = math.sqrt(max(square - result["advantage"] ** 2, 0.0))
    return result

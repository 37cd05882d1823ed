"""RAIL, regression-aware inference: the expected score ŷ and other readings of the score distribution.

`score_logprobs` [N, S] are log π(k | x, c, anchor) over the whole vocabulary, `values` [S]; results [N] in the same
dtype. Source: arXiv 2603.17145; Lukasik et al., "Regression-aware inference with LLMs" (EMNLP 2024).
"""

import torch
from torch import Tensor

from real_megatron.config import Probabilities
from real_megatron.scores import TIE


def expected_score(score_logprobs: Tensor, values: Tensor, probabilities: Probabilities = "full") -> Tensor:
    """ŷ = Σ_k v_k π(k). `full`: π over the whole vocabulary, as in the paper, so that probability on other tokens
    moves ŷ towards 0. `renormalized`: π over the score tokens alone."""
    if probabilities == "renormalized":
        p = torch.softmax(score_logprobs, dim=-1)
    else:
        p = score_logprobs.exp()
    return p @ values.to(p.dtype)


def score_mass(score_logprobs: Tensor) -> Tensor:
    """Σ_k π(k): the probability that the next token is a score at all, in (0, 1]."""
    return score_logprobs.exp().sum(-1)


def score_entropy(score_logprobs: Tensor) -> Tensor:
    """Entropy, in nats, of the distribution renormalised over the score tokens; between 0 and log S."""
    log_p = torch.log_softmax(score_logprobs, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def label_index(labels: Tensor, values: Tensor) -> Tensor:
    """[N] index of the score nearest to each label; the first of two equally near ones (labels averaged over
    annotators may lie between scores). `nearest_score` of tensors, equal to it in every dtype."""
    distances = (values[None, :] - labels[:, None]).abs()
    nearest = distances.amin(dim=-1, keepdim=True)
    step = values.sort().values.diff().min()
    return (distances <= nearest + TIE * step).int().argmax(dim=-1)


def label_logprob(score_logprobs: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """log π(y*) over the whole vocabulary, of the score nearest to the label."""
    return score_logprobs.gather(-1, label_index(labels, values)[:, None])[:, 0]

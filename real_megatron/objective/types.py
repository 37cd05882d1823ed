"""What an objective reads and returns: the model's log-probabilities of a micro-batch, batch totals, metrics."""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Name -> tensor [2], (sum, weight), or tensor [1], a maximum. `metrics.merge` adds them over micro-batches;
`metrics.summarize` then divides."""


@dataclass
class Totals:
    """Sizes of the whole global batch (all micro-batches of all data-parallel ranks) that one update consumes."""

    groups: float
    trajectories: float
    tokens: float
    """Loss-carrying response tokens."""


@dataclass
class ScoredBatch:
    """The model's view of one micro-batch of N trajectories (responses) over a scale of S scores.

    Tokens are those that carry a loss: for RL every sampled response token, for SFT every target token but the score
    token, whose log-probability is in `score_logprobs`. Natural logarithms throughout; float32 in training.
    """

    token_logprobs: Tensor
    """[N_tok], with gradient: log π of each loss-carrying token, trajectory by trajectory."""
    token_trajectory: Tensor
    """[N_tok] int64: index of the token's trajectory in 0..N-1."""
    score_logprobs: Tensor
    """[N, S], with gradient: log π(k | x, c, anchor) over the whole vocabulary. Rows without answer are not read."""
    has_answer: Tensor
    """[N] bool: False where the response has no anchor."""
    labels: Tensor
    """[N]: y* on the scale's values."""
    group: Tensor
    """[N] int64: group of the trajectory, 0..G-1."""
    values: Tensor
    """[S]: numeric value v_k of each score."""
    old_logprobs: Tensor | None = None
    """[N_tok]: log-probability under the policy that sampled the token."""
    ref_logprobs: Tensor | None = None
    """[N_tok]: log-probability under the reference policy of the KL term."""
    advantages: Tensor | None = None
    """[N]: precomputed by a scoring pass, when groups are split over micro-batches; used as they are."""

    @property
    def size(self) -> int:
        """Number of trajectories N."""
        return self.score_logprobs.shape[0]

    def validate(self) -> None:
        """Raise ValueError when shapes disagree or a value that is read is not finite (one device sync)."""
        n, tokens = self.size, self.token_logprobs.shape[0]
        shapes = {"token_logprobs": (tokens,), "token_trajectory": (tokens,), "has_answer": (n,), "labels": (n,)}
        shapes |= {
            "group": (n,),
            "values": (self.score_logprobs.shape[-1],),
            "score_logprobs": (n, self.score_logprobs.shape[-1]),
        }
        shapes |= {"old_logprobs": (tokens,), "ref_logprobs": (tokens,), "advantages": (n,)}
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"ScoredBatch.{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        bad = {name: ~torch.isfinite(tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point()}
        bad["score_logprobs"] = bad["score_logprobs"] & self.has_answer[:, None]
        if not bool(torch.stack([flags.any() for flags in bad.values()]).any()):
            return
        places = []
        for name, flags in bad.items():
            if flags.any():
                rows = flags.nonzero()[:, 0]
                if name in ("token_logprobs", "old_logprobs", "ref_logprobs"):
                    rows = self.token_trajectory[rows]
                where = "scores" if name == "values" else "trajectories"
                places.append(f"{name} ({where} {rows.unique().tolist()[:8]})")
        raise ValueError(
            f"NaN or infinite values in {', '.join(places)}: the model has diverged or its inputs are wrong; "
            "lower the learning rate or resume from an earlier checkpoint"
        )


class Objective(Protocol):
    """What the policy's training step calls on the last pipeline stage."""

    needs_advantages: bool
    """Rewards are compared within groups: these must stay whole, or come with precomputed `advantages`. An objective
    for which this can be True also has `rewards(scored) -> [N]` and `advantages(rewards, group) -> [N]`."""
    needs_old_logprobs: bool
    needs_ref_logprobs: bool

    def __call__(self, scored: ScoredBatch, totals: Totals) -> tuple[Tensor, Metrics]:
        """This micro-batch's contribution to the batch loss (they add up to it; always part of the autograd graph)
        and its metrics."""
        ...

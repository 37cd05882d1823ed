"""What an objective reads and returns: the model's log-probabilities of a micro-batch, batch totals, metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from real_megatron.scores import Aspect

MetricSums = dict[str, Tensor]
"""Name -> tensor [2], (sum, weight), or tensor [1], a maximum, or tensor [1, n], a sample. `metrics.merge` adds them
over micro-batches; `metrics.summarize` then divides, and makes percentiles of samples."""


@dataclass
class Totals:
    """Sizes of the whole global batch (all micro-batches of all data-parallel ranks) that one update consumes."""

    groups: float
    trajectories: float
    tokens: float
    """Loss-carrying response tokens."""


@dataclass(frozen=True)
class ResponseView:
    """What a reward may read of a response besides its score distribution and label."""

    text: str
    """The response as the tokenizer decodes it: CoT, anchor and, where it is sampled, the score."""
    meta: Mapping[str, Any]
    """The further columns of its data row."""


class NotFinite(FloatingPointError):
    """A value that an objective reads is NaN or infinite. `trajectories`: indices of those that it belongs to."""

    def __init__(self, message: str, trajectories: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.trajectories = list(trajectories)


@dataclass
class ScoredBatch:
    """The model's view of one micro-batch of N trajectories (responses) over a scale of S scores, or over the scales of
    A aspects with S scores in all.

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
    """[N]: y* on the scale's values; with aspects [N, A], NaN where there is none."""
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
    responses: Sequence[ResponseView] | None = None
    """[N]: what rewards with `reads_responses` read."""
    sampled: Tensor | None = None
    """[N] int64: index of the score that was sampled behind the anchor, what rewards with `samples_score` read; -1
    where the sampled token is no score."""

    aspects: Sequence[Aspect] = ()
    """Which scores are those of each aspect; none where the scale has no aspects."""

    @property
    def size(self) -> int:
        """Number of trajectories N."""
        return self.score_logprobs.shape[0]

    def parts(self) -> list[tuple[Tensor, "ScoredBatch"]]:
        """The batch of each aspect alone, and the aspect's share [N] of each trajectory's reward: its weight over those
        of all aspects with a label, 0 where it has none (its label is a score's value there). Without aspects the batch
        itself, with share 1.
        """
        if not self.aspects:
            return [(torch.ones_like(self.labels), self)]
        labelled = ~self.labels.isnan()
        weights = labelled * self.labels.new_tensor([aspect.weight for aspect in self.aspects])
        shares = weights / weights.sum(1, keepdim=True)
        parts = []
        for a, aspect in enumerate(self.aspects):
            values = self.values[aspect.columns]
            labels = torch.where(labelled[:, a], self.labels[:, a], values[0])
            logprobs = self.score_logprobs[:, aspect.columns]
            own = replace(self, score_logprobs=logprobs, values=values, labels=labels, aspects=())
            parts.append((shares[:, a], own))
        return parts

    def validate(self) -> None:
        """Raise ValueError where shapes disagree, and NotFinite where a value that is read is not finite.

        Waits for the device once.
        """
        tensors = {
            field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)
        }
        self._check_shapes(tensors)
        bad = {name: ~torch.isfinite(tensor.detach()) for name, tensor in tensors.items() if tensor.is_floating_point()}
        bad["score_logprobs"] = bad["score_logprobs"] & self.has_answer[:, None]
        if self.aspects:  # labels may be missing, but not all of a response
            bad["labels"] = self.labels.isinf() | self.labels.isnan().all(1, keepdim=True)
        if not bool(torch.stack([flags.any() for flags in bad.values()]).any()):
            return
        places: list[str] = []
        found: set[int] = set()
        for name, flags in bad.items():
            if flags.any():
                rows = flags.nonzero()[:, 0]
                if name in ("token_logprobs", "old_logprobs", "ref_logprobs"):
                    rows = self.token_trajectory[rows]
                where = "scores" if name == "values" else "trajectories"
                found |= set() if name == "values" else set(rows.tolist())
                places.append(f"{name} ({where} {rows.unique().tolist()[:8]})")
        raise NotFinite(
            f"NaN or infinite values in {', '.join(places)}: the model has diverged or its inputs are wrong; "
            "lower the learning rate or resume from an earlier checkpoint",
            sorted(found),
        )

    def _check_shapes(self, tensors: dict[str, Tensor]) -> None:
        n, scores, tokens = self.size, self.score_logprobs.shape[-1], self.token_logprobs.shape[0]
        shapes: dict[str, tuple[int, ...]] = {
            "score_logprobs": (n, scores),
            "values": (scores,),
            **dict.fromkeys(("token_logprobs", "token_trajectory", "old_logprobs", "ref_logprobs"), (tokens,)),
            **dict.fromkeys(("has_answer", "group", "advantages", "sampled"), (n,)),
            "labels": (n, len(self.aspects)) if self.aspects else (n,),
        }
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"ScoredBatch.{name} has shape {tuple(tensor.shape)}, expected {shapes[name]}")
        if self.responses is not None and len(self.responses) != n:
            raise ValueError(f"ScoredBatch.responses has {len(self.responses)} entries for {n} trajectories")


class Objective(Protocol):
    """What the policy's training step calls on the last pipeline stage."""

    @property
    def needs_advantages(self) -> bool:
        """Rewards are compared within groups: these must stay whole, or come with precomputed `advantages`. An
        objective for which this can be True is a `GroupObjective`."""
        ...

    @property
    def needs_old_logprobs(self) -> bool:
        """`ScoredBatch.old_logprobs` must be given."""
        ...

    @property
    def needs_ref_logprobs(self) -> bool:
        """`ScoredBatch.ref_logprobs` must be given."""
        ...

    @property
    def needs_responses(self) -> bool:
        """`ScoredBatch.responses` must be given."""
        ...

    def __call__(self, scored: ScoredBatch, totals: Totals) -> tuple[Tensor, MetricSums]:
        """This micro-batch's contribution to the batch loss (they add up to it; always part of the autograd graph)
        and its metrics."""
        ...


@runtime_checkable
class GroupObjective(Objective, Protocol):
    """An objective that compares the rewards of a group: groups that do not fit one micro-batch are scored first, and
    their advantages, computed from whole groups, go with the micro-batches of the update."""

    def rewards(self, scored: ScoredBatch) -> Tensor:
        """[N] rewards, without gradient."""
        ...

    def advantages(self, scored: ScoredBatch) -> Tensor:
        """[N] advantages of whole groups, without gradient."""
        ...

"""The data that flows between rollout, packing and the policy."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trajectory:
    """One response to a prompt, as token ids, up to and including the score anchor, or the score behind it where the
    objective's reward needs a score that was sampled.

    What follows the response's answer position, the anchor's end, is the score distribution π(k | x, c, anchor).
    """

    response_ids: list[int]
    """Response tokens. For RL: CoT, anchor and, where it is sampled, the score's tokens up to the one that decides it
    (`ScoreTree.read`). For SFT the score's tokens and the end of sequence may follow."""
    answer_index: int | None
    """Index into `response_ids` of the last anchor token, behind which the score distribution is read.
    None when the response has no anchor (rule `penalize`)."""
    loss_mask: list[bool] = field(default_factory=list)
    """Per response token: True where log π(token) carries a token loss (sampled tokens; not a forced anchor)."""
    old_logprobs: list[float] | None = None
    """Per response token: log-probability under the engine that sampled it (natural log); None for given CoTs."""
    ref_logprobs: list[float] | None = None
    """Per response token: log-probability under the reference policy, when a KL term is used."""
    finish_reason: str = "stop"
    """`stop` (anchor reached), `length`, `eos` (ended without an anchor) or `given` (a data set's CoT)."""
    forced_anchor: bool = False
    """True when the anchor was appended by the rule `force`."""
    weight_version: int = 0
    """Version of the weights that sampled this response."""
    advantage: float | None = None
    """Precomputed advantage: set only when a group is split over micro-batches (scoring pass)."""
    text: str | None = None
    """The response as text, for rewards that read it (`Objective.needs_responses`); None: not asked for."""

    def __post_init__(self) -> None:
        if not self.loss_mask:
            self.loss_mask = [True] * len(self.response_ids)

    @property
    def score_tokens(self) -> list[int]:
        """What stands behind the answer position: a score that was sampled or given. None without an answer."""
        return [] if self.answer_index is None else self.response_ids[self.answer_index + 1 :]


@dataclass
class Group:
    """All responses to one prompt, with the prompt's label: the unit of packing."""

    prompt_ids: list[int]
    trajectories: list[Trajectory]
    label: float
    """The ground-truth score y*, on the scale's numeric values."""
    example_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    """The data row's further columns, for rewards that read them."""
    labels: tuple[float | None, ...] = ()
    """Where the scale has aspects the label of each, None where there is none; `label` is their mean by weight then."""

"""From an engine's responses to trajectories: cut at the score anchor, with a stated rule for those without one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Trajectory
from real_megatron.config import NoAnchorRule
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import Response, RolloutEngine, SamplingParams
from real_megatron.scores import ScoreScale


@dataclass
class Sampled:
    """Trajectories per prompt, in the prompts' order, and what happened on the way."""

    trajectories: list[list[Trajectory]]
    """`n` per prompt; fewer, possibly none, under the rule `drop`."""
    metrics: dict[str, float]
    """Fractions of all responses: `no_anchor` (of which `truncated` by length, `split_anchor`: the anchor ends inside a
    token), `forced`, `dropped`; `empty_groups` (count); `response_tokens` (mean) and `response_tokens_max`."""


def sample_trajectories(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    rule: NoAnchorRule = "penalize",
    seeds: Sequence[int] | None = None,
) -> Sampled:
    """Sample `params.n` responses per prompt, stopped at the score anchor, as trajectories.

    A response that has no anchor at a token boundary: `penalize` keeps it whole, without an answer position; `force`
    appends the anchor, without token loss (see `with_anchor`); `drop` leaves it out.

    Raises EngineError when the engine does not return exactly what was asked for, PromptRefused for a prompt that it
    cannot take.
    """
    if rule not in get_args(NoAnchorRule):
        raise ValueError(f"no-anchor rule {rule!r}: use one of {', '.join(get_args(NoAnchorRule))}")
    groups = engine.generate(prompts, replace(params, stop=(scale.anchor_text,)), seeds)
    check_complete(groups, len(prompts), params.n)
    counts = dict.fromkeys(("no_anchor", "truncated", "split_anchor", "forced", "dropped"), 0)
    trajectories: list[list[Trajectory]] = []
    for group in groups:
        kept = []
        for response in group:
            cut = scale.cut(tokenizer, response.token_ids)
            if cut is None:
                counts["no_anchor"] += 1
                counts["truncated"] += response.finish_reason == "length"
                counts["split_anchor"] += response.finish_reason == "stop"
                if rule == "drop":
                    counts["dropped"] += 1
                    continue
                counts["forced"] += rule == "force"
            forced = with_anchor(response, scale, params.max_new_tokens) if cut is None and rule == "force" else None
            kept.append(_trajectory(response, cut, forced))
        trajectories.append(kept)
    total = max(1, len(prompts) * params.n)
    lengths = [len(response.token_ids) for group in groups for response in group]
    metrics = {name: count / total for name, count in counts.items()}
    metrics["empty_groups"] = float(sum(not group for group in trajectories))
    metrics["response_tokens"] = sum(lengths) / total
    metrics["response_tokens_max"] = float(max(lengths, default=0))
    return Sampled(trajectories, metrics)


def check_complete(groups: list[list[Response]], prompts: int, n: int) -> None:
    """Raise EngineError unless there are `n` well-formed responses for each of `prompts` prompts."""
    if len(groups) != prompts:
        raise EngineError(f"the rollout engine returned {len(groups)} groups for {prompts} prompts")
    for i, group in enumerate(groups):
        if len(group) != n:
            raise EngineError(f"the rollout engine returned {len(group)} responses for prompt {i}, asked for {n}")
        for response in group:
            if not response.token_ids or len(response.token_ids) != len(response.logprobs):
                raise EngineError(
                    f"the rollout engine returned {len(response.token_ids)} tokens with "
                    f"{len(response.logprobs)} log-probabilities for prompt {i}"
                )


def with_anchor(response: Response, scale: ScoreScale, longest: int) -> tuple[list[int], int]:
    """A response without an anchor, with the anchor appended; and how many of its own tokens are left.

    A final end-of-sequence token gives way to the anchor, and so do the last tokens of a response that would be longer
    than `longest` with it: engines, and the model's positions, have room for no more.
    """
    own = len(response.token_ids) - (response.finish_reason == "eos")
    own = max(0, min(own, longest - len(scale.anchor_ids)))
    return response.token_ids[:own] + scale.anchor_ids, own


def _trajectory(response: Response, cut: int | None, forced: tuple[list[int], int] | None) -> Trajectory:
    ids, logprobs = response.token_ids, response.logprobs
    if forced is not None:
        ids, own = forced
        # Positions without token loss: the value is never read.
        logprobs = logprobs[:own] + [0.0] * (len(ids) - own)
        mask = [True] * own + [False] * (len(ids) - own)
    else:
        ids, logprobs = ids[:cut], logprobs[:cut]
        mask = [True] * len(ids)
    reason = "stop" if cut is not None else "length" if response.finish_reason == "length" else "eos"
    return Trajectory(
        response_ids=ids,
        answer_index=None if cut is None and forced is None else len(ids) - 1,
        loss_mask=mask,
        old_logprobs=logprobs,
        finish_reason=reason,
        forced_anchor=forced is not None,
        weight_version=response.weight_version,
    )

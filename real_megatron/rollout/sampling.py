"""From an engine's responses to trajectories: cut at the score anchor or behind the sampled score, with a stated rule
for those without one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Trajectory
from real_megatron.config import NoAnchorRule
from real_megatron.errors import ConfigError, EngineError, PromptRefused
from real_megatron.rollout.distributed import share
from real_megatron.rollout.engine import BadResponse, Response, RolloutEngine, SamplingParams
from real_megatron.rollout.sampled import SampledGroup, decode, encode
from real_megatron.scores import ScoreScale


@dataclass
class Sampled:
    """Trajectories per prompt, in the prompts' order, and what happened on the way."""

    trajectories: list[list[Trajectory]]
    """`n` per prompt; fewer, possibly none, under the rule `drop`."""
    metrics: dict[str, float]
    """Fractions of all responses: `no_anchor` (of which `truncated` by length, `split_anchor`: the anchor ends inside a
    token), `forced`, `dropped`, and where scores are sampled `off_scale` (what is sampled is no score);
    `empty_groups` (count); `response_tokens` (mean) and `response_tokens_max`."""


def sample_trajectories(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    rule: NoAnchorRule = "penalize",
    seeds: Sequence[int] | None = None,
    score: bool = False,
) -> Sampled:
    """Sample `params.n` responses per prompt, stopped at the score anchor, as trajectories.

    A response that has no anchor at a token boundary: `penalize` keeps it whole, without an answer position; `force`
    appends the anchor, without token loss (see `with_anchor`); `drop` leaves it out.

    With `score` what stands behind the anchor is sampled too, be it a score or something else: the tokens up to the one
    that decides it (`ScoreTree.read`). They are the trajectory's last tokens and carry a token loss. A response without
    room for them counts as one without an anchor. A second request samples them behind a forced anchor, and where
    scores are several tokens behind every anchor.

    With an engine of many ranks each response is made a trajectory on the rank that samples it, and every rank returns
    the same. Log-probs are rounded to float32, in which they travel.

    Raises EngineError when the engine does not return exactly what was asked for, PromptRefused for a prompt that it
    cannot take.
    """
    if rule not in get_args(NoAnchorRule):
        raise ValueError(f"no-anchor rule {rule!r}: use one of {', '.join(get_args(NoAnchorRule))}")

    def serve(own: RolloutEngine, indices: list[int]) -> list[SampledGroup]:
        own_seeds = None if seeds is None else [seeds[i] for i in indices]
        return _sample(own, tokenizer, scale, [prompts[i] for i in indices], params, rule, own_seeds, score)

    groups = share(engine, [len(prompt) for prompt in prompts], serve, encode, decode)
    counts = [group.counts for group in groups]
    total = max(1, len(prompts) * params.n)
    names = ("no_anchor", "truncated", "split_anchor", "forced", "dropped", *(("off_scale",) if score else ()))
    metrics = {name: sum(getattr(count, name) for count in counts) / total for name in names}
    metrics["empty_groups"] = float(sum(not group.trajectories for group in groups))
    metrics["response_tokens"] = sum(count.tokens for count in counts) / total
    metrics["response_tokens_max"] = float(max((count.longest for count in counts), default=0))
    return Sampled([group.trajectories for group in groups], metrics)


def _sample(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    rule: NoAnchorRule,
    seeds: Sequence[int] | None,
    score: bool,
) -> list[SampledGroup]:
    # Where the token behind the anchor is no score, the response goes on, and is cut.
    at_once = score and scale.tree.flat
    stop = score_stop_texts(tokenizer, scale) if at_once else (scale.anchor_text,)
    longest = critique_tokens(scale, params.max_new_tokens)
    responses = engine.generate(prompts, replace(params, stop=stop, max_new_tokens=longest), seeds)
    check_complete(responses, len(prompts), params.n)
    groups = [_group(row, tokenizer, scale, longest, rule, at_once) for row in responses]
    if score:
        _sample_scores(engine, scale, prompts, [group.trajectories for group in groups], params, seeds)
        for group in groups:
            group.counts.off_scale = sum(_off_scale(t, scale) for t in group.trajectories)
    return groups


def _group(
    responses: list[Response],
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    longest: int,
    rule: NoAnchorRule,
    score: bool,
) -> SampledGroup:
    """The responses to a prompt, of `longest` tokens at most, cut, with their counts. With `score` the token behind the
    anchor is kept; but for forced anchors, behind which there is none yet."""
    group = SampledGroup()
    counts = group.counts
    for response in responses:
        counts.tokens += len(response.token_ids)
        counts.longest = max(counts.longest, len(response.token_ids))
        cut = scale.cut(tokenizer, response.token_ids)
        if score and cut == len(response.token_ids):
            cut = None
        if cut is None:
            counts.no_anchor += 1
            counts.truncated += response.finish_reason == "length"
            counts.split_anchor += response.finish_reason == "stop"
            if rule == "drop":
                counts.dropped += 1
                continue
            counts.forced += rule == "force"
        forced = with_anchor(response, scale, longest - score) if cut is None and rule == "force" else None
        group.trajectories.append(_trajectory(response, cut, forced, score))
    return group


def check_complete(groups: list[list[Response]], prompts: int, n: int) -> None:
    """Raise EngineError unless there are `n` well-formed responses for each of `prompts` prompts: BadResponse where
    those of one prompt are too few or malformed, or have log-probabilities that are not finite, which no policy can be
    compared with."""
    if len(groups) != prompts:
        raise EngineError(f"the rollout engine returned {len(groups)} groups for {prompts} prompts")
    for i, group in enumerate(groups):
        if len(group) != n:
            raise BadResponse(i, f"{len(group)} responses", f", asked for {n}")
        for response in group:
            if not response.token_ids or len(response.token_ids) != len(response.logprobs):
                raise BadResponse(
                    i, f"{len(response.token_ids)} tokens with {len(response.logprobs)} log-probabilities"
                )
            if not all(map(math.isfinite, response.logprobs)):
                raise BadResponse(
                    i,
                    "log-probabilities that are not finite",
                    ": its weights are damaged, or overflow in this dtype",
                )


def with_anchor(response: Response, scale: ScoreScale, longest: int) -> tuple[list[int], int]:
    """A response without an anchor, with the anchor appended; and how many of its own tokens are left.

    A final end-of-sequence token gives way to the anchor, and so do the last tokens of a response that would be longer
    than `longest` with it: engines, and the model's positions, have room for no more.
    """
    own = len(response.token_ids) - (response.finish_reason == "eos")
    own = max(0, min(own, longest - len(scale.anchor_ids)))
    return response.token_ids[:own] + scale.anchor_ids, own


def critique_tokens(scale: ScoreScale, most: int) -> int:
    """How many of `most` tokens of a response are for what stands before a score. Single tokens are sampled with it;
    scores of several tokens follow in requests of their own, and what they take is kept free. Raises ConfigError where
    nothing is left."""
    if scale.tree.flat:
        return most
    left = most - scale.tree.most_tokens
    if left < 1:
        raise ConfigError(
            f"data.max_response_tokens is {most}, and a score alone takes {scale.tree.most_tokens} tokens: raise it, "
            "so that there is room for a critique"
        )
    return left


def score_stop_texts(tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> tuple[str, ...]:
    """The anchor followed by each score, as the tokenizer writes them; of scores that are one token each."""
    start = len(tokenizer.decode(scale.anchor_ids))
    tokens = scale.tree.branches[0].ids
    return tuple(scale.anchor_text + tokenizer.decode([*scale.anchor_ids, token])[start:] for token in tokens)


def _trajectory(
    response: Response, cut: int | None, forced: tuple[list[int], int] | None, score: bool = False
) -> Trajectory:
    ids, logprobs = response.token_ids, _float32(response.logprobs)
    if forced is not None:
        ids, own = forced
        # Positions without token loss: the value is never read.
        logprobs = logprobs[:own] + [0.0] * (len(ids) - own)
        mask = [True] * own + [False] * (len(ids) - own)
    else:
        end = None if cut is None else cut + score
        ids, logprobs = ids[:end], logprobs[:end]
        mask = [True] * len(ids)
    reason = "stop" if cut is not None else "length" if response.finish_reason == "length" else "eos"
    return Trajectory(
        response_ids=ids,
        answer_index=cut - 1 if cut is not None else len(ids) - 1 if forced is not None else None,
        loss_mask=mask,
        old_logprobs=logprobs,
        finish_reason=reason,
        forced_anchor=forced is not None,
        weight_version=response.weight_version,
    )


def _float32(numbers: list[float]) -> list[float]:
    """The nearest numbers that float32 has: what other ranks get, and what packing makes of them."""
    rounded: list[float] = np.array(numbers, np.float32).tolist()
    return rounded


def _sample_scores(
    engine: RolloutEngine,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    trajectories: list[list[Trajectory]],
    params: SamplingParams,
    seeds: Sequence[int] | None,
) -> None:
    """Sample a score behind each anchor that has none yet, and add its tokens, with their log-probs, to the
    trajectory."""
    places = [
        (i, k)
        for i, group in enumerate(trajectories)
        for k, t in enumerate(group)
        if t.answer_index is not None and not t.score_tokens
    ]
    if not places:
        return
    sequences = [prompts[i] + trajectories[i][k].response_ids for i, k in places]
    # Seeds that no sample of the prompt's first request has drawn from: engines give sample k the seed, or seed + k.
    further = None if seeds is None else [seeds[i] + params.n + k for i, k in places]
    behind = replace(params, n=1, max_new_tokens=scale.tree.most_tokens, stop=())
    try:
        sampled = engine.generate(sequences, behind, further)
    except PromptRefused as refusal:
        raise PromptRefused(places[refusal.index][0], str(refusal)) from refusal
    try:
        check_complete(sampled, len(sequences), 1)
    except BadResponse as bad:
        raise bad.at(places[bad.index][0]) from bad
    for (i, k), (response,) in zip(places, sampled, strict=True):
        trajectory = trajectories[i][k]
        # What follows the token that decides is no part of the score.
        used = min(scale.tree.read(response.token_ids)[1], len(response.token_ids))
        trajectory.response_ids = [*trajectory.response_ids, *response.token_ids[:used]]
        trajectory.loss_mask = [*trajectory.loss_mask, *[True] * used]
        trajectory.old_logprobs = [*(trajectory.old_logprobs or []), *_float32(response.logprobs[:used])]
        trajectory.weight_version = min(trajectory.weight_version, response.weight_version)


def _off_scale(trajectory: Trajectory, scale: ScoreScale) -> bool:
    return trajectory.answer_index is not None and scale.tree.read(trajectory.score_tokens)[0] is None

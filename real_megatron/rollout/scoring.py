"""Judging with an engine: sample critiques and read the score distribution behind each, in one pass where possible."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from real_megatron.batch.score_logprobs import score_logprobs
from real_megatron.config import JudgedNoAnchorRule
from real_megatron.errors import PromptRefused
from real_megatron.rollout.engine import BadResponse, RolloutEngine, SamplingParams
from real_megatron.rollout.sampling import check_complete, critique_tokens, score_stop_texts, with_anchor
from real_megatron.scores import ScoreScale


@dataclass
class ScoredResponse:
    """One critique and the distribution of the score behind it."""

    response_ids: list[int]
    """The critique, cut at and including the anchor; whole when it has none."""
    score_logprobs: list[float] | None
    """log π(score_k | prompt, critique, anchor) at temperature 1 over the whole vocabulary; None without an anchor."""
    forced_anchor: bool
    finish_reason: str
    """`stop` (anchor reached), `length` or `eos` (ended without one)."""


def sample_scored(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    rule: JudgedNoAnchorRule = "drop",
    seeds: Sequence[int] | None = None,
) -> list[list[ScoredResponse]]:
    """`params.n` critiques per prompt with their score distributions.

    At temperature 0 or 1, where scores are one token each, generation stops behind the score, and the distribution is
    read off the engine's own log-probs at that position. A second pass (branch_logprobs) serves the rest: scores of
    several tokens, other temperatures, responses that end at the anchor, and, under the rule `force`, responses without
    an anchor, which get it appended. Under `drop` these have no distribution; the caller leaves them out. Where scores
    are several tokens, responses have room for them within `params.max_new_tokens`.

    Raises EngineError when the engine does not return exactly what was asked for, PromptRefused (index in `prompts`)
    for a prompt that it cannot take, alone or with a critique behind it. The log-probs are not checked: they may be
    NaN.
    """
    one_pass = params.temperature in (0, 1) and scale.tree.flat
    params = replace(params, max_new_tokens=critique_tokens(scale, params.max_new_tokens))
    watch = scale.tree.branches[0].ids if one_pass else ()
    stop = score_stop_texts(tokenizer, scale) if one_pass else (scale.anchor_text,)
    groups = engine.generate(prompts, replace(params, stop=stop, watch_ids=watch), seeds)
    check_complete(groups, len(prompts), params.n)
    results: list[list[ScoredResponse]] = []
    unread: list[tuple[ScoredResponse, int]] = []
    for index, group in enumerate(groups):
        row = []
        for response in group:
            ids = response.token_ids
            cut = scale.cut(tokenizer, ids)
            scored = ScoredResponse(ids[:cut], None, False, "stop")
            if cut is None:
                scored.finish_reason = "length" if response.finish_reason == "length" else "eos"
                if rule == "force":
                    scored.response_ids, _ = with_anchor(response, scale, params.max_new_tokens)
                    scored.forced_anchor = True
                    unread.append((scored, index))
            elif one_pass and cut < len(ids):
                if response.watched is None:
                    raise BadResponse(index, "no score log-probabilities")
                scored.score_logprobs = response.watched[cut]
            else:
                unread.append((scored, index))
            row.append(scored)
        results.append(row)
    if unread:
        sequences = [prompts[index] + scored.response_ids for scored, index in unread]
        try:
            logprobs = engine.branch_logprobs(sequences, scale.tree.branches)
        except PromptRefused as error:
            raise PromptRefused(unread[error.index][1], str(error)) from error
        for (scored, _), values in zip(unread, logprobs.tolist(), strict=True):
            scored.score_logprobs = values
    if not scale.tree.direct:
        read = [s for row in results for s in row if s.score_logprobs is not None]
        asked = torch.tensor([s.score_logprobs for s in read], dtype=torch.float64).reshape(-1, scale.tree.width)
        for scored, values in zip(read, score_logprobs(scale.tree, asked).tolist(), strict=True):
            scored.score_logprobs = values
    return results

"""What a judge says about a prompt: critiques, and their score distributions read as numbers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from real_megatron.rollout.engine import RolloutEngine, SamplingParams
from real_megatron.rollout.scoring import ScoredResponse, sample_scored
from real_megatron.rollout.seeded import uniforms
from real_megatron.scores import ScoreScale

NoAnchorRule = Literal["force", "drop"]
Probabilities = Literal["full", "renormalized"]


@dataclass(frozen=True)
class Reading:
    """One critique and the score behind it. The score fields are None for a critique without an anchor, unforced."""

    critique: str
    """The response's text before the anchor."""
    expected: float | None
    """RAIL: Σ_k v_k π(k)."""
    sampled: float | None
    """The value of one score drawn from π, renormalised over the scale."""
    probabilities: list[float] | None
    """π(k) over the whole vocabulary, in the scale's order."""
    no_anchor: bool
    truncated: bool
    """Ended by the length limit before an anchor."""
    tokens: int
    """Length of the response, up to and including the anchor."""


def read(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    prompts: Sequence[list[int]],
    ids: Sequence[str],
    *,
    params: SamplingParams,
    seed: int = 0,
    rule: NoAnchorRule = "force",
    probabilities: Probabilities = "full",
) -> list[list[Reading]]:
    """`params.n` readings for each prompt (token ids).

    Critiques and drawn scores depend on `seed`, the prompt's id and the weights, not on the other prompts. A critique
    without an anchor gets one appended (`force`) or stays without a score (`drop`). `renormalized` takes the
    expectation over the score tokens only. Raises ValueError for log-probs that are NaN.
    """
    seeds = [example_seed(seed, "critique", id) for id in ids]
    groups = sample_scored(engine, tokenizer, scale, prompts, params, "force" if rule == "force" else "penalize", seeds)
    return [
        [
            _reading(tokenizer, scale, response, uniforms(example_seed(seed, "score", id), k, 1)[0], probabilities)
            for k, response in enumerate(group)
        ]
        for id, group in zip(ids, groups, strict=True)
    ]


def example_seed(seed: int, purpose: str, id: str) -> int:
    """A 63-bit seed for one example and purpose, independent of the example's place in the data."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _reading(
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    response: ScoredResponse,
    uniform: float,
    probabilities: Probabilities,
) -> Reading:
    text = tokenizer.decode(response.response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    answered = response.score_logprobs is not None
    if answered:
        text = text.removesuffix(scale.anchor_text)
    fields = (text, None, None, None)
    if answered:
        logp = np.asarray(response.score_logprobs, dtype=np.float64)
        if np.isnan(logp).any():
            raise ValueError("the model's score log-probs are NaN: its weights are damaged, or overflow in this dtype")
        p = np.exp(logp)
        # The largest is taken out first, so that a distribution whose mass underflows can still be normalised.
        q = np.exp(logp - logp.max())
        q /= q.sum()
        drawn = min(int(np.searchsorted(q.cumsum(), uniform, side="right")), len(q) - 1)
        expected = float((p if probabilities == "full" else q) @ np.asarray(scale.values))
        fields = (text, expected, scale.values[drawn], p.tolist())
    found = answered and not response.forced_anchor
    truncated = not found and response.finish_reason == "length"
    return Reading(*fields, not found, truncated, len(response.response_ids))

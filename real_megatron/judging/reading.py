"""What a judge says about a prompt: critiques, and their score distributions read as numbers."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from transformers import PreTrainedTokenizerBase

from real_megatron.errors import EngineError
from real_megatron.rollout.scoring import ScoredResponse
from real_megatron.scores import Aspect, ScoreScale, decode, weighted_mean


@dataclass(frozen=True)
class Answer:
    """The score behind a critique."""

    expected: float
    """RAIL: Σ_k v_k π(k), over the whole vocabulary or the scale alone (`scale.probabilities`)."""
    renormalized: float
    """Σ_k v_k π(k) / Σ_k π(k): always within the scale."""
    sampled: float
    """The value of one score drawn from π, renormalised over the scale."""
    probabilities: list[float]
    """π(k) over the whole vocabulary, in the scale's order. Of several aspects none: each has its own."""
    aspects: tuple["Answer", ...] = ()
    """Where the scale has aspects the score of each; the numbers above are their means by weight."""

    @property
    def mass(self) -> float:
        """Σ_k π(k); of several aspects the mean."""
        return fmean(aspect.mass for aspect in self.aspects) if self.aspects else sum(self.probabilities)


@dataclass(frozen=True)
class Reading:
    """One critique and the score behind it."""

    critique: str
    """The response's text before the anchor."""
    answer: Answer | None
    """None for a critique without an anchor to which none was appended."""
    no_anchor: bool
    """The critique did not come to the anchor by itself."""
    truncated: bool
    """Ended by the length limit before an anchor."""
    tokens: int
    """Length of the response, up to and including the anchor."""


def example_seed(seed: int, purpose: str, id: str) -> int:
    """A 63-bit seed for one example and purpose, independent of the example's place in the data."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def read_response(
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    response: ScoredResponse,
    uniforms: Sequence[float],
    renormalized: bool,
) -> Reading:
    """A response as numbers. `uniforms` in [0, 1), one an aspect, draw the sampled scores; `renormalized` takes
    expectations over the scores only.

    Raises EngineError for log-probs that are not numbers: such a model can score no prompt.
    """
    text = decode(tokenizer, response.response_ids)
    answer = None
    if response.score_logprobs is not None:
        text = text.removesuffix(scale.anchor_text)
        answer = _answer(scale, response.score_logprobs, uniforms, renormalized)
    found = answer is not None and not response.forced_anchor
    truncated = not found and response.finish_reason == "length"
    return Reading(text, answer, not found, truncated, len(response.response_ids))


def mean_answer(answers: Sequence[Answer]) -> Answer | None:
    """The means over several critiques of one prompt; None of none."""
    if not answers:
        return None
    columns = zip(*(answer.probabilities for answer in answers), strict=True)
    aspects = zip(*(answer.aspects for answer in answers), strict=True)
    means = [mean_answer(of_aspect) for of_aspect in aspects]
    return Answer(
        fmean(answer.expected for answer in answers),
        fmean(answer.renormalized for answer in answers),
        fmean(answer.sampled for answer in answers),
        [fmean(column) for column in columns],
        tuple(mean for mean in means if mean is not None),
    )


def weighted_answer(aspects: Sequence[Aspect], answers: Sequence[Answer | None]) -> Answer:
    """One score of several aspects: the means by weight over those that are there, of which there must be one."""

    def mean(number: Callable[[Answer], float]) -> float:
        return weighted_mean(aspects, [None if answer is None else number(answer) for answer in answers])

    return Answer(
        mean(lambda answer: answer.expected),
        mean(lambda answer: answer.renormalized),
        mean(lambda answer: answer.sampled),
        [],
        tuple(answer for answer in answers if answer is not None),
    )


def answers_of(readings: Sequence[Reading]) -> list[Answer]:
    """The scores behind those critiques that have one."""
    return [reading.answer for reading in readings if reading.answer is not None]


def _answer(scale: ScoreScale, score_logprobs: list[float], uniforms: Sequence[float], renormalized: bool) -> Answer:
    found = [
        _of_aspect(aspect.values, score_logprobs[aspect.columns], uniform, renormalized)
        for aspect, uniform in zip(scale.parts, uniforms, strict=True)
    ]
    return weighted_answer(scale.aspects, found) if scale.aspects else found[0]


def _of_aspect(values: Sequence[float], score_logprobs: list[float], uniform: float, renormalized: bool) -> Answer:
    logp = np.asarray(score_logprobs, dtype=np.float64)
    if not np.isfinite(logp.max()):  # the maximum of any NaN is NaN
        what = "NaN" if np.isnan(logp.max()) else "infinite"
        raise EngineError(f"the model's score log-probs are {what}: its weights are damaged, or overflow in this dtype")
    p = np.exp(logp)
    # The largest is taken out first, so that a distribution whose mass underflows can still be normalised.
    q = np.exp(logp - logp.max())
    q /= q.sum()
    drawn = min(int(np.searchsorted(q.cumsum(), uniform, side="right")), len(q) - 1)
    full, within = (float(weights @ np.asarray(values)) for weights in (p, q))
    return Answer(within if renormalized else full, within, values[drawn], p.tolist())

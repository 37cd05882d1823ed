"""The score scale: score texts, their token ids in context, their numeric values, and the anchor before them.

A judge's response is `CoT + anchor + score`. Everything is found by tokenising those texts with the model's own
tokenizer, never by rules about model names.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from real_megatron.errors import ConfigError

CONTEXT = "\n"
"""Text before the anchor when it is tokenised. A response's anchor stands in the middle of a text; tokenizers that mark
the start of a text would mark the anchor too if it were tokenised alone."""

TIE = 1e-3
"""Two scores are equally near to a label where their distances differ by at most this part of the smallest step between
scores. So 0.15 is half-way between 0.1 and 0.2 in float32 and float64, though none of the three is a binary number."""

_LAST_PLACES = 2
"""Positions before the end of a response at which `cut` looks for the score before it bisects."""


@dataclass(frozen=True)
class ScoreScale:
    """The score tokens K of a tokenizer and the anchor that precedes them. Build it with `ScoreScale.resolve`."""

    texts: list[str]
    """Score texts as configured, for example `["1", "2", "3", "4", "5"]`."""
    values: list[float]
    """Numeric value v_k of each score."""
    score_ids: list[int]
    """Token id of each score, as it follows the anchor; all distinct."""
    anchor_ids: list[int]
    """Tokens of the effective anchor, as the tokenizer encodes it within a response."""
    anchor_text: str
    """Text of the effective anchor, as the tokenizer decodes it; `cut` looks for it. Shorter than the configured anchor
    where the anchor's end belongs to the score token: `"[RESULT] "` becomes `"[RESULT]"` if `" 4"` is one token."""

    @classmethod
    def resolve(
        cls, tokenizer: Any, scores: Sequence[str], values: Sequence[float] | None = None, anchor: str = "[RESULT] "
    ) -> "ScoreScale":
        """Find the score tokens and the effective anchor.

        `tokenizer` is any Hugging Face tokenizer. Each `anchor + score` is tokenised; the longest common token prefix
        within the anchor is the effective anchor and each score must be exactly one further token. `values` default
        to the numbers themselves, or 1, 2, … when no score text is a number.

        Raises ConfigError, naming the text, its tokens and the fix, when the scale does not fit the tokenizer.
        """
        texts = list(scores)
        numbers = _values(texts, values)
        if not _visible(anchor):
            raise ConfigError(
                f"scale.anchor: the anchor {anchor!r} has no visible character; give a text such as '[RESULT] '"
            )
        context, rows = _encode_all(tokenizer, [anchor + text for text in texts])
        length = _common_prefix(rows)
        while length and not _visible(anchor).startswith(_visible(_text_after(tokenizer, context, rows[0][:length]))):
            length -= 1
        anchor_ids = rows[0][:length]
        anchor_text = _text_after(tokenizer, context, anchor_ids) if anchor_ids else ""
        if not _visible(anchor_text):
            raise ConfigError(
                f"the tokens of the scores after the anchor {anchor!r} have no common beginning with visible text: "
                f"{_show(tokenizer, rows[0])}, {_show(tokenizer, rows[1])}; end the anchor differently, for example "
                "with ': ' or '] '"
            )
        score_ids: list[int] = []
        for text, row in zip(texts, rows, strict=True):
            rest = row[length:]
            if len(rest) != 1:
                raise ConfigError(
                    f"score {text!r} is {len(rest)} tokens after the anchor {anchor_text!r}: "
                    f"{_show(tokenizer, rest)}; every score must be one token. Use a scale that is, such as 0-9 or "
                    "letters A-J with their values, or end the anchor differently"
                )
            if rest[0] == tokenizer.unk_token_id:
                raise ConfigError(
                    f"score {text!r} is the unknown token {_show(tokenizer, rest)} in this tokenizer; "
                    "use score texts that its vocabulary has"
                )
            if rest[0] in score_ids:
                other = texts[score_ids.index(rest[0])]
                raise ConfigError(
                    f"scores {other!r} and {text!r} are the same token {_show(tokenizer, rest)} after the anchor "
                    f"{anchor_text!r}; use score texts that the tokenizer tells apart"
                )
            score_ids.append(rest[0])
        return cls(texts, numbers, score_ids, anchor_ids, anchor_text)

    def cut(self, tokenizer: Any, ids: Sequence[int]) -> int | None:
        """Position of a response's score: the smallest t for which `ids[:t]` decodes to a text that ends with the
        effective anchor. None when the anchor is absent or ends only inside of tokens.

        The text is searched, not the token ids, because sampled tokens may spell the anchor in more than one way.
        """
        ids = list(ids)
        text = decode(tokenizer, ids)
        start = text.find(self.anchor_text)
        while start >= 0:
            t = _token_boundary(tokenizer, ids, text, start + len(self.anchor_text))
            if t is not None:
                return t
            start = text.find(self.anchor_text, start + 1)
        return None

    def label_index(self, label: float) -> int:
        """Index of the score whose value is nearest to `label` (`nearest_score`)."""
        return nearest_score(self.values, label)


def nearest_score(values: Sequence[float], number: float) -> int:
    """Index of the value nearest to `number`; the first of two equally near ones (see `TIE`)."""
    distances = [abs(value - number) for value in values]
    steps = (upper - lower for lower, upper in itertools.pairwise(sorted(values)))
    farthest = min(distances) + TIE * min(steps, default=0.0)
    return next(k for k, distance in enumerate(distances) if distance <= farthest)


def _values(texts: list[str], values: Sequence[float] | None) -> list[float]:
    if len(texts) < 2:
        raise ConfigError(f"a score scale needs at least two scores, got {texts}")
    duplicates = sorted({text for text in texts if texts.count(text) > 1})
    if duplicates:
        raise ConfigError(f"scale.scores lists {duplicates} more than once; list each score once")
    blank = [text for text in texts if not text.strip()]
    if blank:
        raise ConfigError(f"scale.scores holds an empty text {blank[0]!r}; each score needs a visible text")
    if values is None:
        numbers = [_number(text) for text in texts]
        if all(number is None for number in numbers):
            return [float(k + 1) for k in range(len(texts))]
        words = [text for text, number in zip(texts, numbers, strict=True) if number is None]
        if words:
            raise ConfigError(f"scores {words} are not numbers while others are; give scale.values for all of them")
        result = [number for number in numbers if number is not None]
    else:
        result = [float(value) for value in values]
        if len(result) != len(texts):
            raise ConfigError(f"scale.values has {len(result)} entries for {len(texts)} scores; give one per score")
    if not all(math.isfinite(value) for value in result):
        raise ConfigError(f"scale.values must be finite numbers, got {result}")
    if len(set(result)) != len(result):
        raise ConfigError(f"the score values {result} are not distinct; give each score its own value in scale.values")
    return result


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of exactly these tokens: special tokens are shown, spaces are left as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _encode_all(tokenizer: Any, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    """Tokens of CONTEXT, and of each text as its continuation; no context where tokens span the boundary."""
    context: list[int] = []
    rows = []
    for text in texts:
        ids = tokenizer.encode(CONTEXT + text, add_special_tokens=False)
        decoded = decode(tokenizer, ids)
        t = _token_boundary(tokenizer, ids, decoded, len(CONTEXT)) if decoded.startswith(CONTEXT) else None
        if t is None:
            return [], [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        context = ids[:t]
        rows.append(ids[t:])
    return context, rows


def _text_after(tokenizer: Any, context: list[int], ids: list[int]) -> str:
    return decode(tokenizer, context + ids)[len(decode(tokenizer, context)) if context else 0 :]


def _common_prefix(rows: list[list[int]]) -> int:
    length = min(len(row) for row in rows)
    return next((t for t in range(length) if any(row[t] != rows[0][t] for row in rows)), length)


def _visible(text: str) -> str:
    """Text without spaces and case, since some tokenizers change them when they decode."""
    return "".join(text.split()).casefold()


def _show(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def _token_boundary(tokenizer: Any, ids: list[int], text: str, end: int) -> int | None:
    """Smallest t for which ids[:t] decodes to exactly text[:end], where `text` is what all ids decode to; or None.

    A search over the decoded length, which grows with t as long as the decoded ids are a prefix of the text. They
    are not where t lies within a character of several byte tokens; such a t counts as the next t where they are.

    Generation stops at an anchor or behind the score, and a decode of a long response takes long: the last two places
    are tried first, and only what ends before them is bisected.
    """

    @functools.cache
    def prefix(t: int) -> tuple[int, int]:
        while t < len(ids):
            decoded = decode(tokenizer, ids[:t])
            if text.startswith(decoded):
                return len(decoded), t
            t += 1
        return len(text), t

    first = len(ids)
    while first > 1 and prefix(first - 1)[0] >= end:
        first -= 1
        if first == len(ids) - _LAST_PLACES:
            first = 1 + bisect.bisect_left(range(1, first), end, key=lambda t: prefix(t)[0])
            break
    length, t = prefix(first)
    return t if length == end else None

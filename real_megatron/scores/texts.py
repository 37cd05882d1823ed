"""Texts as tokens of a model's own tokenizer, and tokens as texts."""

import bisect
import functools
from typing import Any

CONTEXT = "\n"
"""Text before the anchor when it is tokenised. A response's anchor stands in the middle of a text; tokenizers that mark
the start of a text would mark the anchor too if it were tokenised alone."""

_LAST_PLACES = 2
"""Positions before the end of a response at which `cut` looks for the score before it bisects."""


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of exactly these tokens: special tokens are shown, spaces are left as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def encode_all(tokenizer: Any, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    """Tokens of CONTEXT, and of each text as its continuation; no context where tokens span the boundary."""
    context: list[int] = []
    rows = []
    for text in texts:
        ids = tokenizer.encode(CONTEXT + text, add_special_tokens=False)
        decoded = decode(tokenizer, ids)
        t = token_boundary(tokenizer, ids, decoded, len(CONTEXT)) if decoded.startswith(CONTEXT) else None
        if t is None:
            return [], [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        context = ids[:t]
        rows.append(ids[t:])
    return context, rows


def text_after(tokenizer: Any, context: list[int], ids: list[int]) -> str:
    return decode(tokenizer, context + ids)[len(decode(tokenizer, context)) if context else 0 :]


def common_prefix(rows: list[list[int]]) -> int:
    length = min(len(row) for row in rows)
    return next((t for t in range(length) if any(row[t] != rows[0][t] for row in rows)), length)


def visible(text: str) -> str:
    """Text without spaces and case, since some tokenizers change them when they decode."""
    return "".join(text.split()).casefold()


def show(tokenizer: Any, ids: list[int]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


def token_boundary(tokenizer: Any, ids: list[int], text: str, end: int) -> int | None:
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

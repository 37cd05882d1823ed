"""The score scale: score texts, their token ids in context, their numeric values, and the anchor before them.

A judge's response is `CoT + anchor + score`. Everything is found by tokenising those texts with the model's own
tokenizer, never by rules about model names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from real_megatron.config import AspectConfig, ScaleConfig
from real_megatron.errors import ConfigError
from real_megatron.scores.aspects import Aspect
from real_megatron.scores.nearest import nearest_score
from real_megatron.scores.texts import common_prefix, decode, encode_all, show, text_after, token_boundary, visible
from real_megatron.scores.tree import ScoreTree

EOS = "eos"
"""What `scale.ends` calls the tokenizer's end of sequence."""


@dataclass(frozen=True)
class ScoreScale:
    """The scores K in a tokenizer's tokens, and the anchor that precedes them. Build it with `ScoreScale.of`, or with
    `ScoreScale.resolve`."""

    texts: list[str]
    """Score texts as configured, for example `["1", "2", "3", "4", "5"]`."""
    values: list[float]
    """Numeric value v_k of each score."""
    tree: ScoreTree
    """The scores' token ids as they follow the anchor."""
    anchor_ids: list[int]
    """Tokens of the effective anchor, as the tokenizer encodes it within a response."""
    anchor_text: str
    """Text of the effective anchor, as the tokenizer decodes it; `cut` looks for it. Shorter than the configured anchor
    where the anchor's end belongs to the score's tokens: `"[RESULT] "` becomes `"[RESULT]"` if `" 4"` is one token."""
    aspects: tuple[Aspect, ...] = ()
    """Where a response has several scores: which of `texts` and `values`, one aspect's after the other's, are whose."""

    @classmethod
    def of(cls, tokenizer: Any, config: ScaleConfig) -> "ScoreScale":
        """The scale that a run's configuration describes, with its aspects; see `resolve`."""
        if config.aspects:
            return _with_aspects(tokenizer, config)
        return cls.resolve(tokenizer, config.scores, config.values, config.anchor, config.spellings, config.ends)

    @classmethod
    def resolve(
        cls,
        tokenizer: Any,
        scores: Sequence[str],
        values: Sequence[float] | None = None,
        anchor: str = "[RESULT] ",
        spellings: Mapping[str, Sequence[str]] | None = None,
        ends: Sequence[str] = (),
    ) -> "ScoreScale":
        """Find the scores' tokens and the effective anchor.

        tokenizer: any Hugging Face tokenizer. Each `anchor + score` is tokenised; the longest common token prefix
            within the anchor is the effective anchor, and what follows it are the score's tokens
        values: default to the numbers themselves, or 1, 2, … when no score text is a number
        spellings: further texts of a score, whose probabilities are added to it. Those that this tokenizer does not
            tell apart from the score's own text, or from each other, are left out
        ends: texts one of which must follow a score that is the beginning of another; `eos` is the end of sequence. Of
            a text its first token counts. Where no score begins another they say nothing

        Raises ConfigError, naming the text, its tokens and the fix, when the scale does not fit the tokenizer.
        """
        texts = list(scores)
        numbers = _values(texts, values)
        if not visible(anchor):
            raise ConfigError(
                f"scale.anchor: the anchor {anchor!r} has no visible character; give a text such as '[RESULT] '"
            )
        ways = _spellings(texts, spellings or {})
        written = [text for own in ways for text in own]
        context, rows = encode_all(tokenizer, [anchor + text for text in written])
        anchor_ids, anchor_text = _effective_anchor(tokenizer, context, rows, anchor)
        length = len(anchor_ids)
        paths = {text: tuple(row[length:]) for text, row in zip(written, rows, strict=True)}
        _check_paths(tokenizer, ways, paths, anchor_text)
        tokens = [list(dict.fromkeys(paths[text] for text in own)) for own in ways]
        tree = ScoreTree(tokens)
        following = {branch.path: branch.ids for branch in tree.branches}
        inner = {text: following[path] for text, path in paths.items() if path in following}
        if ends and inner:
            tree = ScoreTree(tokens, _end_ids(tokenizer, anchor, inner, ends))
        return cls(texts, numbers, tree, anchor_ids, anchor_text)

    @property
    def score_ids(self) -> list[int]:
        """Token id of each score, of a scale whose scores are one token each. Raises ValueError for others."""
        if not self.tree.direct:
            raise ValueError(f"the scores {self.texts} are not one token each: their token ids are a tree")
        return list(self.tree.branches[0].ids)

    def cut(self, tokenizer: Any, ids: Sequence[int]) -> int | None:
        """Position of a response's score: the smallest t for which `ids[:t]` decodes to a text that ends with the
        effective anchor. None when the anchor is absent or ends only inside of tokens.

        The text is searched, not the token ids, because sampled tokens may spell the anchor in more than one way.
        """
        ids = list(ids)
        text = decode(tokenizer, ids)
        start = text.find(self.anchor_text)
        while start >= 0:
            t = token_boundary(tokenizer, ids, text, start + len(self.anchor_text))
            if t is not None:
                return t
            start = text.find(self.anchor_text, start + 1)
        return None

    @property
    def parts(self) -> tuple[Aspect, ...]:
        """The aspects, or the scale itself as the only one."""
        return self.aspects or (Aspect("", self.texts, self.values),)

    def label_index(self, label: float) -> int:
        """Index of the score whose value is nearest to `label` (`nearest_score`)."""
        return nearest_score(self.values, label)


def _with_aspects(tokenizer: Any, config: ScaleConfig) -> ScoreScale:
    """A scale whose anchor is what the anchors of all aspects begin with. An aspect's own anchor is given, not read."""
    scales = [_of_aspect(tokenizer, name, aspect, config) for name, aspect in config.aspects.items()]
    starts = [scale.anchor_ids for scale in scales]
    context, _ = encode_all(tokenizer, [config.anchor])
    anchor_ids, anchor_text = _effective_anchor(tokenizer, context, starts, config.anchor)
    given = [tuple(start[len(anchor_ids) :]) for start in starts]
    if len(set(given)) < len(given):
        raise ConfigError(
            f"scale.aspects: the anchors of {', '.join(config.aspects)} must differ; as tokens they are "
            f"{[show(tokenizer, list(ids)) for ids in given]}"
        )
    aspects: list[Aspect] = []
    texts: list[str] = []
    values: list[float] = []
    for (name, aspect), scale in zip(config.aspects.items(), scales, strict=True):
        aspects.append(Aspect(name, scale.texts, scale.values, len(values), aspect.weight))
        texts += scale.texts
        values += scale.values
    tree = ScoreTree.joined([scale.tree for scale in scales], given)
    return ScoreScale(texts, values, tree, anchor_ids, anchor_text, tuple(aspects))


def _of_aspect(tokenizer: Any, name: str, aspect: AspectConfig, config: ScaleConfig) -> ScoreScale:
    own = aspect.scores is not None
    spellings = aspect.spellings if aspect.spellings is not None else {} if own else config.spellings
    values = aspect.values if aspect.values is not None else None if own else config.values
    try:
        return ScoreScale.resolve(
            tokenizer,
            config.scores if aspect.scores is None else aspect.scores,
            values,
            config.anchor + (aspect.anchor or f"{name}: "),
            spellings,
            config.ends,
        )
    except ConfigError as error:
        raise ConfigError(f"scale.aspects.{name}: {error}") from None


def _effective_anchor(tokenizer: Any, context: list[int], rows: list[list[int]], anchor: str) -> tuple[list[int], str]:
    """The tokens, within the anchor, with which all rows begin, and their text."""
    length = common_prefix(rows)
    while length and not visible(anchor).startswith(visible(text_after(tokenizer, context, rows[0][:length]))):
        length -= 1
    ids = rows[0][:length]
    text = text_after(tokenizer, context, ids) if ids else ""
    if not visible(text):
        other = next((row for row in rows if row[:1] != rows[0][:1]), rows[1])
        raise ConfigError(
            f"the tokens of the scores after the anchor {anchor!r} have no common beginning with visible text: "
            f"{show(tokenizer, rows[0])}, {show(tokenizer, other)}; end the anchor differently, for example "
            "with ': ' or '] '"
        )
    return ids, text


def _spellings(texts: list[str], further: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Per score all of its texts, the configured one first."""
    if unknown := [text for text in further if text not in texts]:
        raise ConfigError(f"scale.spellings names {unknown[0]!r}, which is no score; give spellings of {texts}")
    ways = [[text, *further.get(text, ())] for text in texts]
    seen: set[str] = set()
    for text in (text for own in ways for text in own):
        if not text.strip():
            raise ConfigError(f"scale.spellings holds an empty text {text!r}; each spelling needs a visible text")
        if text in seen:
            raise ConfigError(f"scale.spellings: {text!r} is given twice; give each text to one score, once")
        seen.add(text)
    return ways


def _check_paths(
    tokenizer: Any, ways: Sequence[Sequence[str]], paths: Mapping[str, tuple[int, ...]], anchor_text: str
) -> None:
    """Refuse texts that the tokenizer cannot write, and scores that it does not tell apart."""
    first: dict[tuple[int, ...], tuple[int, str]] = {}
    for score, own in enumerate(ways):
        for text in own:
            path = paths[text]
            if not path:
                raise ConfigError(
                    f"score {text!r} has no tokens of its own after the anchor {anchor_text!r}; use another score text"
                )
            if tokenizer.unk_token_id in path:
                raise ConfigError(
                    f"score {text!r} has the unknown token in this tokenizer: {show(tokenizer, list(path))}; use score "
                    "texts that its vocabulary has"
                )
            other, said = first.setdefault(path, (score, text))
            if other != score:
                raise ConfigError(
                    f"scores {said!r} and {text!r} are the same tokens {show(tokenizer, list(path))} after the anchor "
                    f"{anchor_text!r}; use score texts that the tokenizer tells apart"
                )


def _end_ids(tokenizer: Any, anchor: str, inner: Mapping[str, Sequence[int]], ends: Sequence[str]) -> list[int]:
    """The first token of each end.

    inner: texts of scores that could go on, with the token ids that would go on from there
    """
    found: dict[int, str] = {}
    for end in ends:
        if end == EOS:
            if tokenizer.eos_token_id is None:
                raise ConfigError("scale.ends: this tokenizer has no end of sequence; name the text that ends a score")
            found[tokenizer.eos_token_id] = end
            continue
        for text in inner:
            _, (row, ended) = encode_all(tokenizer, [anchor + text, anchor + text + end])
            if ended[: len(row)] != row or len(ended) == len(row):
                raise ConfigError(
                    f"scale.ends: {end!r} is no token of its own behind the score {text!r}: {show(tokenizer, ended)}; "
                    "name a text that the tokenizer does not join with a score"
                )
            found[ended[len(row)]] = end
    for token, end in found.items():
        for text, following in inner.items():
            if token in following:
                raise ConfigError(
                    f"scale.ends: {end!r} begins with the token {show(tokenizer, [token])[0]!r}, which continues the "
                    f"score {text!r} to another; leave that end out"
                )
    return list(found)


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

"""Critiques without their verdict: where a critique ends, and whether a set of critiques still spells out the label.

A critique that ends "So the overall score is 4." leaves nothing to judge: the score token copies it, and the expected
score and the reward see a one-hot distribution. Feedback Collection's critiques all end so.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from real_megatron.data.score_statements import OPENERS, WORDS, plain_text, sentences, statement_begin

_SHOWN = 600
"""Characters of a critique's beginning and of its end in which its sentences are read."""


def without_end(
    critique: str, end: str | None = None, statements: bool = True, values: Sequence[float] | None = None
) -> str:
    """The critique up to where its own score statement begins, without the blanks and commas before it.

    A statement is one at the end: "So the overall score is 4.", "**Final rating:** 4/5", "I give it a score of four.",
    "[RESULT] 4", several of them in a row. Scores that are mentioned elsewhere stay, as does a text without any.

    end: a regular expression of the user's; the critique ends where it first matches
    statements: whether to cut statements; else `end` alone decides
    values: the scale's; numbers outside their range are no scores
    """
    found = re.search(end, critique) if end else None
    text = critique if found is None else _trimmed(critique[: found.start()])
    while statements and (begin := statement_begin(text, values)) is not None:
        text = _trimmed(text[:begin])
    return text


def _trimmed(text: str) -> str:
    """Without what led to the rest: opening marks, the mark of a heading or of a list, a comma, a colon or a dash."""
    text = text.rstrip()
    body = text.rstrip(OPENERS)
    if body and not body[-1].isspace():  # marks that may close the word before belong to it
        marks = text[len(body) :]
        body += marks[: len(marks) - len(marks.lstrip("*_`\"'’#>|"))]
    body = body.rstrip()
    lines, _, last = body.rpartition("\n")
    if not last.strip("-*#>| \t"):
        body = lines.rstrip()
    return body.removesuffix(" -").rstrip().rstrip(",;:–—").rstrip()


@dataclass(frozen=True)
class Leak:
    """How many critiques of a set spell out their label, and no other score of the scale, in a sentence at their end or
    in their first one."""

    critiques: int
    stated: int
    by_chance: float
    """How many would, if the sentences knew nothing of the labels."""
    examples: list[int]
    """Indices of the first of them."""

    @property
    def found(self) -> bool:
        """More than five in a hundred above chance, and four standard errors (Poisson) above it."""
        above = self.stated - self.by_chance
        return above > 0.05 * self.critiques and above > 4 * max(1.0, self.by_chance) ** 0.5


def find_leak(critiques: Sequence[str], labels: Sequence[int], scores: Sequence[str], values: Sequence[float]) -> Leak:
    """Whether the critiques' first and last sentences say the labels: as score text, as number or as number word.

    The last three count, since a closing tag or a polite word may stand behind the statement. Only a sentence that
    names one score of the scale alone counts. So a critique that works with numbers, such as the running scores
    "3 3 2 4" of the tiny judge, states nothing. What chance would give follows from how often each label occurs and
    each score is named: sentences that name scores for other reasons ("one of them", "A good answer") exceed it only as
    far as they know the label.

    labels: per critique the index of its score
    """
    patterns = [_spelled(text, value) for text, value in zip(scores, values, strict=True)]
    lowest, highest = patterns[0].pattern, patterns[-1].pattern
    # "out of 5" and "from 1 to 5" name the scale, no score.
    scale = re.compile(rf"(?:/|\bout\s+of)\s*(?:{highest})|(?:{lowest})\s*(?:-|–|to|and)\s*(?:{highest})")
    named = [_named(critique, patterns, scale) for critique in critiques]
    right = [i for i, (alone, label) in enumerate(zip(named, labels, strict=True)) if label in alone]
    share, occurrences = Counter(labels), Counter(k for alone in named for k in alone)
    by_chance = sum(count * share[k] for k, count in occurrences.items()) / max(1, len(labels))
    return Leak(len(critiques), len(right), by_chance, right[:3])


def _named(critique: str, patterns: Sequence[re.Pattern[str]], scale: re.Pattern[str]) -> set[int]:
    """Indices of the scores that one of the first and last sentences names alone."""
    alone = set()
    for sentence in {*sentences(critique[:_SHOWN])[:1], *sentences(critique[-_SHOWN:])[-3:]}:
        text = scale.sub(" ", sentence)
        present = [k for k, pattern in enumerate(patterns) if pattern.search(text)]
        if len(present) == 1:
            alone.add(present[0])
    return alone


def _spelled(text: str, value: float) -> re.Pattern[str]:
    forms = {text, plain_text(text) or text, f"{value:g}"}
    if value == int(value):
        forms.add(f"{value:.1f}")
    if value in range(len(WORDS)):
        word = WORDS[int(value)]
        forms |= {word, word.capitalize()}
    choice = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    # Not within a word or a number, and not the 1 of -1; in 3-4 the dash is no sign.
    return re.compile(rf"(?<![\w.])(?<!(?<!\w)[-−])(?:{choice})(?!\w|\.\d)")

"""Critiques without their verdict: where a critique ends, and whether a set of critiques still spells out the label.

A critique that ends "So the overall score is 4." leaves nothing to judge: the score token copies it, and the expected
score and the reward see a one-hot distribution. Feedback Collection's critiques all end so.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
WINDOW = 600
"""A statement begins within so many characters of the critique's end."""

_MARK = r"[*_`#>\"'“”‘’()\[\]{}\s]*"  # Markdown, quotes, brackets
_NUMBER = rf"(?:\d+(?:\.\d+)?|{'|'.join(WORDS)})"
_OF = rf"(?:{_MARK}(?:/|out\s+of){_MARK}{_NUMBER}|{_MARK}(?:points?|stars?)\b|\s+on\s+a\s+scale\s+[^.!?\n]{{1,30}})"
_SCORE = r"(?:score|rating|grade|mark|verdict|result)"
_KIND = r"(?:overall|final|total|resulting|appropriate|assigned|suggested|numerical|numeric)"
# The number, or a letter; then at most a subordinate clause up to the end of the text.
_VALUE = rf"(?:{_MARK}(?:an?\s+)?(?:{_SCORE}\s+of\s+)?{_MARK}(?:{_NUMBER}(?![\w-])|[A-J][+-]?(?![\w-])))"
_END = (
    rf"{_OF}*{_MARK}(?:</?\w+>)?"
    r"(?:(?:[,;–—-]|\b(?:as|because|since|due|given|for|reflecting|indicating|based|according|under|per)\b)[^.!?\n]*)?"
    r"[.!?\s*_`\"'”’)\]}]*\Z"
)
_THEREFORE = (
    r"(?:and\s+)?(?:so|thus|hence|therefore|overall|accordingly|consequently|as\s+a\s+result|finally|"
    r"in\s+(?:conclusion|summary)|to\s+sum\s+up|for\s+(?:these|this)\s+reasons?|"
    r"(?:based\s+on|given|considering)\s+(?:this|these|the|all)\b[^.,;:!?\n]{0,80})\b,?\s+"
)
_BEGIN = r"(?:\A|(?<=[.!?:;,\n])|(?<=[.!?][\"'”’)*])|(?<=\s))"
_SENTENCE = r"(?:\A|(?<=[.!?\n])|(?<=[.!?][\"'”’)*]))"

# "So the overall score is 4.", "**Final rating:** 4/5", "Score 4", "[RESULT] 4"
_NAMED = (
    rf"(?:{_BEGIN}{_MARK}(?:{_THEREFORE})+|{_SENTENCE}{_MARK}){_MARK}"
    rf"(?:(?:the|my|its|this|their|your|an?)\s+)?(?:(?:response|answer)['’]s\s+)?(?:{_KIND}\s+){{0,3}}{_MARK}<?{_SCORE}"
    rf"(?:\s+(?:of|for|given\s+to|assigned\s+to)\s+(?:the|this)\s+\w+)?{_MARK}"
    rf"(?:[:=→–—-]+|\b(?:is|would\s+be|will\s+be|should\s+be|must\s+be|was)\b(?:\s+(?:therefore|thus|hence|only))?:?)?"
)
# "Therefore, I would give this response a score of 4.", "The response deserves a 4."
_GIVEN = (
    rf"(?:{_BEGIN}{_MARK}(?:{_THEREFORE})+|{_SENTENCE}{_MARK})"
    r"(?:i|we|it|this|(?:the|this)\s+\w+)(?:['’]d)?(?:\s+(?:would|will|should|can|could|must|have|has|to|be|is|was|been|"
    r"therefore|thus|only|hereby)){0,4}\s+"
)
_GIVE = (
    r"(?:gives?|given|assign(?:s|ed)?|award(?:s|ed)?|deserve[sd]?|receive[sd]?|earn(?:s|ed)?|gets?|merit(?:s|ed)?|"
    r"warrant(?:s|ed)?|rate[sd]?|score[sd]?|grade[sd]?)"
)
_OBJECT = r"(?:\s+(?:it|this|that|(?:the|this)\s+\w+))?(?:\s+(?:as|at|with))?"
_STATEMENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        _NAMED + _VALUE + _END,
        # A verb of giving needs the word score, an article, or the scale: "the response gives two" is about something
        # else.
        _GIVEN
        + rf"{_GIVE}{_OBJECT}\s+{_MARK}(?:(?:an?\s+)?(?:{_KIND}\s+)?{_SCORE}(?:\s+of)?\s+{_MARK}{_NUMBER}"
        + rf"|an?\s+{_MARK}{_NUMBER}|{_NUMBER}(?={_OF}))(?![\w-])"
        + _END,
        # A line of its own: "4/5"
        rf"(?:\A|(?<=\n)){_MARK}{_NUMBER}{_OF}{_MARK}[.!]?{_MARK}\Z",
        # The anchor of the published data, with or without its score
        rf"\[RESULT\]{_MARK}(?:{_NUMBER}|[A-J])?{_MARK}[.!]?{_MARK}\Z",
    )
)


def without_end(critique: str, end: str | None = None, statements: bool = True) -> str:
    """The critique up to where its own score statement begins, without the blanks and commas before it.

    A statement is one at the end: "So the overall score is 4.", "**Final rating:** 4/5", "I give it a score of four.",
    "[RESULT] 4", several of them in a row. Scores that are mentioned elsewhere stay, as does a text without any.

    end: a regular expression of the user's; the critique ends where it first matches
    statements: whether to cut statements; else `end` alone decides
    """
    found = re.search(end, critique) if end else None
    text = critique if found is None else _trimmed(critique[: found.start()])
    while statements:
        begin = max(0, len(text) - WINDOW)
        starts = [match.start() for s in _STATEMENTS if (match := s.search(text, begin)) is not None]
        if not starts:
            return text
        text = _trimmed(text[: min(starts)])
    return text


def _trimmed(text: str) -> str:
    return text.rstrip().rstrip(",;:*_#([-–—").rstrip()


@dataclass(frozen=True)
class Leak:
    """How many critiques of a set spell out their label in the last sentence, and no other score of the scale."""

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
    """Whether the last sentences say the labels: as score text, as number or as number word.

    Only a sentence that names one score of the scale alone counts. So a critique that works with numbers, such as the
    running scores "3 3 2 4" of the tiny judge, states nothing. What chance would give follows from how often each label
    occurs and each score is named: sentences that name scores for other reasons ("one of them", "A good answer")
    exceed it only as far as they know the label.

    labels: per critique the index of its score
    """
    patterns = [_spelled(text, value) for text, value in zip(scores, values, strict=True)]
    lowest, highest = patterns[0].pattern, patterns[-1].pattern
    # "out of 5" and "from 1 to 5" name the scale, no score.
    scale = re.compile(rf"(?:/|\bout\s+of)\s*(?:{highest})|(?:{lowest})\s*(?:-|–|to|and)\s*(?:{highest})")
    named: list[int | None] = []
    for critique in critiques:
        sentence = scale.sub(" ", _last_sentence(critique))
        present = [k for k, pattern in enumerate(patterns) if pattern.search(sentence)]
        named.append(present[0] if len(present) == 1 else None)
    right = [i for i, (k, label) in enumerate(zip(named, labels, strict=True)) if k == label]
    share, occurrences = Counter(labels), Counter(k for k in named if k is not None)
    by_chance = sum(count * share[k] for k, count in occurrences.items()) / max(1, len(labels))
    return Leak(len(critiques), len(right), by_chance, right[:3])


def _spelled(text: str, value: float) -> re.Pattern[str]:
    forms = {text, f"{value:g}"}
    if value in range(len(WORDS)):
        word = WORDS[int(value)]
        forms |= {word, word.capitalize()}
    choice = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    return re.compile(rf"(?<![\w.])(?:{choice})(?!\w|\.\d)")


def _last_sentence(critique: str) -> str:
    return re.split(r"(?<=[.!?])[\"'”’)*]*\s+|\n+", critique.strip())[-1]

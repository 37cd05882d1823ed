"""Where a critique begins to state its own score: "So the overall score is 4.", "**Final rating:** 4/5", "[RESULT] 4".

The grammar reads plain text: `plain_text` takes Markdown, quotes, brackets and tags away first. So the patterns need no
optional decoration between words, whose repetition makes a failing match slower than the square of the text's length.
"""

import re
from collections.abc import Iterator, Sequence

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WINDOW = 600
"""A statement begins within so many characters of the critique's end."""
_SENTENCES = 4
"""It is one of so many last sentences: behind it stand at most polite words and marks of the end."""

# Before the statement; within a sentence only the first line.
_SO = r"(?:and )?(?:so|thus|hence|therefore|overall|accordingly|consequently),?"
_THEREFORE = (
    rf"(?:{_SO}|(?:altogether|finally|as a result|on balance|taken together|(?:in )?(?:conclusion|summary)|in total|"
    r"in short|to (?:sum up|conclude|summarize)|all in all|for (?:these|this) reasons?)[,:]?|"
    r"(?:based on|given|considering)(?: (?:this|these|that|the|all|everything))(?: \w+){0,3}?|"
    r"(?:based on|given|considering|with|taking) (?:this|these|that|the|all|everything)\b[^.,;:!?\n]{0,80},)"
)
_LEAD = rf"(?:{_THEREFORE} ){{0,3}}"
_RESPONSE = r"(?:response|answer|reply|output|submission|solution|summary|essay|translation|text|assistant|candidate)"
_THE_RESPONSE = rf"(?:it|this|that|(?:the|this|that|its|their) (?:(?:assistant|model|student)'s )?{_RESPONSE})"
_ARTICLE = r"(?:(?:the|my|our|its|this|their|your|an?) )?"
_KIND = r"(?:(?:overall|final|total|resulting|appropriate|assigned|suggested|numerical|numeric) )"
# "Mark" and "result" are words of many answers: "the final result is 5" is arithmetic.
_SCORE = rf"(?:{_KIND}{{0,3}}(?:score|rating|grade|verdict)|{_KIND}mark)"

# The score itself.
_NUMBER = rf"(?:\d+(?:\.\d+)?|{'|'.join(WORDS)})"
_GIVEN_NUMBER = rf"(?P<value>{_NUMBER})(?![\w-])"
_VALUE = rf"(?P<value>{_NUMBER}|(?-i:[A-J][+-]?))(?![\w-])"
_OF = (
    rf"(?: ?,? ?(?:/|out of) ?(?P<most>{_NUMBER})| ?(?P<percent>%|percent\b)| (?:points?|stars?)\b|"
    r",? on a scale [^.!?\n]{1,30})"
)
_IS = (
    r"(?: ?[:=→–—-]{1,3} ?| (?:is|would be|will be|should be|must be|is set to)"
    r"(?: (?:therefore|thus|hence|only))?:? | )"
)
_FITTING = (
    r"(?: (?:is|seems|would(?: \w+)? be)(?: \w+)? "
    r"(?:appropriate|warranted|justified|fitting|fair|deserved|merited|reasonable|suitable|assigned|given|awarded))"
)

# Behind it: a subordinate clause; polite words, or the mark of the end.
_CLAUSE = (
    r"(?: ?[,;–—-]| (?:as|because|since|due|given|for|reflecting|indicating|based|according|under|per|"
    r"on (?:the|this) (?:rubric|scale))\b)[^.!?\n]*"
)
_CLOSING = r"(?:I hope (?:this|that|it)|hope this|(?:please )?let me know|thank you|thanks|end\b)[^.!?\n]{0,80}"
_END = rf"(?:{_CLAUSE})?[.!?:]*(?:[ ,]{{1,3}}{_CLOSING}[.!?:]*){{0,2}} ?\Z"

_WOULD = r"(?:'d)?(?: (?:would|will|should|can|could|must|have|has|to|be|is|was|been|therefore|thus|only|hereby)){0,4}"
_GIVE = (
    r"(?:gives?|given|assign(?:s|ed)?|award(?:s|ed)?|deserve[sd]?|receive[sd]?|earn(?:s|ed)?|gets?|merit(?:s|ed)?|"
    r"warrant(?:s|ed)?|rate[sd]?|score[sd]?|grade[sd]?)"
)
_GIVES = rf"{_LEAD}(?:I|we|{_THE_RESPONSE}){_WOULD} {_GIVE}(?: {_THE_RESPONSE})?(?: (?:as|at|with))?"
_FITS = r"(?:corresponds?|aligns?|fits?|match(?:es)?|falls?|meets?|equates?|translates?|belongs?|amounts?)"

# A space stands for one character of white space.
_STATEMENTS = tuple(
    re.compile((pattern + _END).replace(" ", r"\s"), re.IGNORECASE)
    for pattern in (
        # "So the overall score is 4.", "Final rating: 4/5", "Score (1-5): 4", "the score is a rating of four"
        rf"{_LEAD}{_ARTICLE}(?:{_RESPONSE}'s )?{_SCORE}(?: (?:assigned|given|awarded))?"
        rf"(?: (?:of|for|to) (?:the|this) {_RESPONSE})?(?: ?, ?(?:{_NUMBER} ?[-–] ?|out of |/ ?){_NUMBER})?{_IS}"
        rf"(?:an? )?(?:{_SCORE} of )?{_VALUE}{_OF}{{0,2}}",
        # "For these reasons, a score of 3 is appropriate."
        rf"{_LEAD}{_ARTICLE}{_SCORE} of {_VALUE}{_OF}{{0,2}}{_FITTING}?",
        # "Overall: 4/5", "Result: 4"
        rf"(?:(?:overall|final) )?(?:overall|final|result|mark) ?[:=-] ?{_VALUE}{_OF}{{0,2}}",
        # A verb of giving needs the word score, an article, or the scale: "the response gives two" is about something
        # else.
        rf"{_GIVES} (?:(?:an? )?{_SCORE}(?: of)?|an?) {_GIVEN_NUMBER}{_OF}{{0,2}}",
        rf"{_GIVES},? {_GIVEN_NUMBER}{_OF}{{1,2}}",
        # "This corresponds to a score of 3."
        rf"{_LEAD}{_THE_RESPONSE}(?: (?:therefore|thus|best|most|closely)){{0,2}} {_FITS} "
        rf"(?:(?:with|to|under|into|in) )?{_ARTICLE}{_SCORE} (?:of )?{_VALUE}{_OF}{{0,2}}",
        # "So it is a 4."
        rf"(?:{_THEREFORE} ){{1,3}}{_THE_RESPONSE}(?:'s| is| would be) an? {_GIVEN_NUMBER}{_OF}{{0,2}}",
        # "4/5", "So, 4 out of 5."
        rf"{_LEAD}{_GIVEN_NUMBER}{_OF}{{1,2}}",
        # The anchor of the published data, with or without its score
        rf"(?-i:RESULT)(?:[: ]{{1,2}}{_VALUE})?",
    )
)

_SO_BEGINS = re.compile(rf"{_SO} ".replace(" ", r"\s"), re.IGNORECASE)
_TAG = re.compile(r"</[\w:-]+>|<(?:br|hr)\s*/?>|<[\w:-]+$", re.IGNORECASE)
_OPENING_TAG = re.compile(r"<([\w:-]+)>")
_RULE = re.compile(r"^[ \t]*[-=_*~#]{3,}[ \t]*$", re.MULTILINE)
_MARKUP = re.compile(r"[*_`#>|\"“”\[\]{})☀-➿\U0001F000-\U0001FAFF\uFE0F]|(?<!\w)'|'(?!\w)")  # emojis too
_ABBREVIATION = re.compile(r"\b(?:e\.\s?g|i\.\s?e|etc|vs|cf|approx|resp)\.", re.IGNORECASE)
_BLANKS = re.compile(r"\s+")
OPENERS = "*_`#>|\"“”'‘’[{(<"


def plain_text(text: str) -> str:
    """The words and punctuation of a text: no Markdown, quotes, brackets, tags, rules, or dots of abbreviations.

    Every run of white space is one space, or one line break if it has one. "(" is a comma.
    """
    text = _TAG.sub(" ", _RULE.sub("", text.replace("’", "'").replace("‘", "'")))
    text = _OPENING_TAG.sub(lambda match: f" {match[1].replace('_', ' ')}: ", text)
    text = _ABBREVIATION.sub(lambda match: match[0].replace(".", ""), text)
    text = _MARKUP.sub("", text.replace("(", " , "))
    return _BLANKS.sub(lambda match: "\n" if "\n" in match[0] else " ", text).strip()


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text in plain words, without those that have neither letter nor digit."""
    return [part for part in re.split(r"(?<=[.!?])\s|\n", plain_text(text)) if any(map(str.isalnum, part))]


def statement_begin(text: str, values: Sequence[float] | None = None) -> int | None:
    """Where the statement at the end of a text begins, the earliest place that fits; None without one.

    values: numbers of the scale; a number outside their range that names no scale of its own ("4 out of 10") is none
        of its scores
    """
    found = None
    for begin in _beginnings(text):
        tail = plain_text(text[begin - (text[begin - 1 : begin] == "<") :])
        if len(re.findall(r"[.!?]\s|\n", tail)) > _SENTENCES:
            break
        if any((match := s.match(tail)) and _on_scale(match, values) for s in _STATEMENTS):
            found = begin
    return found


def _beginnings(text: str) -> Iterator[int]:
    """Where a statement may begin, last first: where a sentence, a line or a part of one does, or "so", "therefore"."""
    offset = max(0, len(text) - _WINDOW)
    words = [offset + match.start() for match in re.finditer(r"(?<!\w)\w", text[offset:])]
    for begin in reversed(words):
        before = text[:begin].rstrip(OPENERS + " \t")
        opened = "(" in text[len(before) : begin]
        part = not before or (before[-1] in ".!?;…)\n-–—" and text[begin - 1] not in ".-")  # not in "9.5", "3-4"
        if opened or part or _SO_BEGINS.match(text, begin):
            yield begin


def _on_scale(match: re.Match[str], values: Sequence[float] | None) -> bool:
    """Whether the number is one of its own scale's ("4 out of 10"), else of `values`. A letter always is."""
    groups = match.groupdict()
    value = _number(groups.get("value"))
    if value is None:
        return True
    if groups.get("percent"):
        return value <= 100
    if groups.get("most"):
        return value <= (_number(groups["most"]) or 0)
    return values is None or min(values) <= value <= max(values)


def _number(text: str | None) -> float | None:
    if text is None or text[0] in "ABCDEFGHIJ":
        return None
    return float(WORDS.index(text.lower())) if text.lower() in WORDS else float(text)

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
_SOME_LEAD = rf"(?:{_THEREFORE} ){{1,3}}"
_RESPONSE = r"(?:response|answer|reply|output|submission|solution|summary|essay|translation|text|assistant|candidate)"
_THE_RESPONSE = rf"(?:it|this|that|(?:the|this|that|its|their) (?:(?:assistant|model|student)'s )?{_RESPONSE})"
_ARTICLE = r"(?:(?:the|my|our|its|this|their|your|an?) )?"
_KIND = r"(?:(?:overall|final|total|resulting|appropriate|assigned|suggested|numerical|numeric) )"
# "Mark" and "result" are words of many answers: "the final result is 5" is arithmetic.
_SCORE = rf"(?:{_KIND}{{0,3}}(?:score|rating|grade|verdict)|{_KIND}mark)"

# The score itself.
_NUMBER = rf"(?:[+−-]?\d+(?:\.\d+)?|{'|'.join(WORDS)})"
_GIVEN_NUMBER = rf"(?P<value>{_NUMBER})(?![\w-])"
_VALUE = rf"(?P<value>{_NUMBER}|(?-i:[A-HJ][+-]?))(?![\w-])"  # no grade I, which is a word
_OUT_OF = rf"(?: ?,? ?(?:/|out of) ?(?P<most>{_NUMBER})| (?:points?|stars?)\b|,? on a scale [^.!?\n]{{1,30}})"
_OF = rf"(?:{_OUT_OF}| ?(?P<percent>%|percent\b))"
_IS = (
    r"(?: ?[:=→–—-]{1,3} ?| (?:is|remains|would be|will be|should be|must be|is set to)"
    r"(?: (?:therefore|thus|hence|only))?:? )"
)
_FITTING = (
    r"(?: (?:is|seems|would(?: \w+)? be)(?: \w+)? "
    r"(?:appropriate|warranted|justified|fitting|fair|deserved|merited|reasonable|suitable|assigned|given|awarded))"
)

# Behind it: a subordinate clause, but not "for style" and the like, since another score may be for something else; then
# polite words, the reason, or the mark of the end.
_CLAUSE = (
    r"(?: ?[,;–—-]| (?:as|because|since|due|given|for (?:this|these|the following|the above)|reflecting|indicating|"
    r"based|according|under|per|on (?:the|this) (?:rubric|scale))\b)(?:[^.!?\n]|[.!?](?=\S))*"
)
_CLOSING = (
    r"(?:I hope (?:this|that|it)|hope this|(?:please )?let me know|thank you|thanks|end\b|this is (?:because|due))"
    r"[^.!?\n]{0,120}"
)
_END = rf"[.!?:]*(?:[ ,]{{1,3}}{_CLOSING}[.!?:]*){{0,2}} ?\Z"

_WOULD = r"(?:'d)?(?: (?:would|will|should|can|could|must|have|has|to|be|is|was|been|therefore|thus|only|hereby)){0,4}"
_GIVE = (
    r"(?:gives?|given|assign(?:s|ed)?|award(?:s|ed)?|deserve[sd]?|receive[sd]?|earn(?:s|ed)?|gets?|merit(?:s|ed)?|"
    r"warrant(?:s|ed)?|rate[sd]?|score[sd]?|grade[sd]?|say)"
)
_GIVES = rf"{_LEAD}(?:I|we|{_THE_RESPONSE}){_WOULD} {_GIVE}(?: {_THE_RESPONSE})?(?: (?:as|at|with))?"
_FITS = r"(?:corresponds?|aligns?|fits?|match(?:es)?|falls?|meets?|equates?|translates?|belongs?|amounts?)"


def _patterns(*patterns: str, clause: bool) -> tuple[re.Pattern[str], ...]:
    """A space stands for one character of white space. clause: whether a subordinate clause may follow."""
    end = (rf"(?:{_CLAUSE})?" if clause else "") + _END
    return tuple(re.compile((pattern + end).replace(" ", r"\s"), re.IGNORECASE) for pattern in patterns)


_NAME = (
    rf"{_ARTICLE}(?:{_RESPONSE}'s )?{_SCORE}(?: (?:assigned|given|awarded))?"
    rf"(?: (?:of|for|to) (?:the|this) {_RESPONSE})?(?: ?, ?(?:{_NUMBER} ?[-–] ?|out of |/ ?){_NUMBER})?"
)
_SCORE_OF = rf"{_ARTICLE}{_SCORE} of {_VALUE}{_OF}{{0,2}}"
_STATEMENTS = _patterns(
    # "So the overall score is 4.", "Final rating: 4/5", "Score (1-5): 4", "the score is a rating of four"
    rf"{_LEAD}{_NAME}{_IS}(?:an? )?(?:{_SCORE} of )?{_VALUE}{_OF}{{0,2}}",
    rf"{_SOME_LEAD}{_NAME} {_VALUE}{_OF}{{0,2}}",
    # "For these reasons, a score of 3 is appropriate."
    rf"{_LEAD}{_SCORE_OF}{_FITTING}",
    rf"{_SOME_LEAD}{_SCORE_OF}",
    # "Overall: 4/5", "Result: 4"
    rf"(?:(?:overall|final) )?(?:overall|final|result|mark) ?[:=-] ?{_VALUE}{_OF}{{0,2}}",
    # A verb of giving needs the word score, an article, or the scale: "the response gives two" is about something
    # else.
    rf"{_GIVES} (?:(?:an? )?{_SCORE}(?: of)?|an?) {_GIVEN_NUMBER}{_OUT_OF}{{0,2}}",
    rf"{_GIVES},? {_GIVEN_NUMBER}{_OUT_OF}{{1,2}}",
    # "This corresponds to a score of 3."
    rf"{_LEAD}{_THE_RESPONSE}(?: (?:therefore|thus|best|most|closely)){{0,2}} {_FITS} "
    rf"(?:(?:with|to|under|into|in) )?{_ARTICLE}{_SCORE} (?:of )?{_VALUE}{_OF}{{0,2}}",
    # "So it is a 4."
    rf"{_SOME_LEAD}{_THE_RESPONSE}(?:'s| is| would be) an? {_GIVEN_NUMBER}{_OUT_OF}{{0,2}}",
    # The anchor of the published data, with or without its score
    rf"(?-i:RESULT)(?:[: ]{{1,2}}{_VALUE})?",
    clause=True,
)
# These need a whole sentence or line: "A score of 5, however, needs more" and "Aside: a score of 5" only mention one.
_PLAIN_STATEMENTS = _patterns(rf"{_NAME} {_VALUE}{_OF}{{0,2}}", _SCORE_OF, clause=False)
# "4/5", "So, 4 out of 5.": of the scale's highest value, since "3/4" may be the tests that passed.
(_BARE,) = _patterns(rf"{_LEAD}{_GIVEN_NUMBER}{_OUT_OF}{{1,2}}", clause=False)

_SO_BEGINS = re.compile(rf"{_SO} ".replace(" ", r"\s"), re.IGNORECASE)
_TAG = re.compile(r"</[\w:-]+>|<(?:br|hr)\s*/?>|<[\w:-]+$", re.IGNORECASE)
_OPENING_TAG = re.compile(r"<([\w:-]+)>")
_RULE = re.compile(r"^[ \t]*[-=_*~#]{3,}[ \t]*$", re.MULTILINE)
_MARKUP = re.compile(r"[*_`#>|\"“”\[\]{})☀-➿\U0001F000-\U0001FAFF\uFE0F]|(?<!\w)'|'(?!\w)")  # emojis too
_ABBREVIATION = re.compile(r"\b(?:e\.\s?g|i\.\s?e|etc|vs|cf|approx|resp|Dr|Mrs?|Ms|Prof|Fig)\.", re.IGNORECASE)
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
    for begin, whole in _beginnings(text):
        tail = plain_text(text[begin - (text[begin - 1 : begin] == "<") :])
        if len(re.findall(r"[.!?]\s|\n", tail)) > _SENTENCES:
            break
        patterns = (*_STATEMENTS, *_PLAIN_STATEMENTS) if whole else _STATEMENTS
        stated = any((match := pattern.match(tail)) and _on_scale(match, values) for pattern in patterns)
        if stated or (whole and (match := _BARE.match(tail)) and _is_highest(match["most"], values)):
            found = begin
    return found


def _beginnings(text: str) -> Iterator[tuple[int, bool]]:
    """Where a statement may begin, last first, and whether a sentence or line does: else a part of one, or "so"."""
    offset = max(0, len(text) - _WINDOW)
    words = [offset + match.start() for match in re.finditer(r"(?<!\w)\w", text[offset:])]
    for begin in reversed(words):
        before = text[:begin].rstrip(OPENERS + " \t")
        last = before[-1:]
        whole = not last or (last in ".!?…\n" and text[begin - 1] != ".")  # not in "9.5"
        part = "(" in text[len(before) : begin] or (last in ":;)-–—" and text[begin - 1] != "-")  # not in "3-4"
        if whole or part or _SO_BEGINS.match(text, begin) or text.startswith("RESULT]", begin):
            yield begin, whole


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


def _is_highest(most: str | None, values: Sequence[float] | None) -> bool:
    """Whether a bare "4/5" is of the scale. Stars need no number."""
    return most is None or values is None or _number(most) == max(values)


def _number(text: str | None) -> float | None:
    """A number in digits or as a word; None for a letter."""
    if text is None:
        return None
    if text.lower() in WORDS:
        return float(WORDS.index(text.lower()))
    return float(text.replace("−", "-")) if text[-1].isdigit() else None

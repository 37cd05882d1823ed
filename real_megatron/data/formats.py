"""Record formats of judge data: each reads a record as fields of a prompt, score annotations and a critique.

A format is a reader under a name of `data.*.format`, added with `register_format`, or named as `module:name`. A reader

- gets one record, a mapping of column names to JSON values, exactly as it stands in the file;
- returns a `Record`; one without scores has no label: `load_examples` leaves it out, counts and logs it, or with
  `needs_label` (as of `jsonl`) raises DataError;
- raises `BadRecord` with a message that says what is wrong and how to fix it; the place is added by the caller. Any
  other exception is a bug of the reader and ends the run with its traceback.

The published formats here are those of Prometheus (Kim et al., arXiv 2310.08491 and 2405.01535). Feedback Collection
(CC BY 4.0 by its card on the hub) and Feedback Bench hold one score per record, with the prompt's parts in columns
`orig_*`; the evaluation files of FLASK, Vicuna Bench and MT Bench (repository prometheus-eval/prometheus-eval) hold the
finished prompt in `instruction` and several annotations in `gpt4_score` (FLASK also `human_score`). Their evaluation
averages the annotations of a record, leaves out records without any, and strips surrounding white space and a stray
`",` from `instruction`. The licences of the other data are their publishers' to state: read them before use.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

from real_megatron.errors import ConfigError, DataError
from real_megatron.registry import Registry, calling_module

RESULT = "[RESULT]"
HEADINGS = {
    "The instruction to evaluate": "orig_instruction",
    "Response to evaluate": "orig_response",
    "Reference Answer (Score 5)": "orig_reference_answer",
    "Score Rubrics": "score_rubric",
}
RUBRIC = re.compile(
    r"\[(?P<orig_criteria>.*)\]\s*"
    + r"\s*".join(rf"Score {k}:\s*(?P<orig_score{k}_description>.*?)" for k in range(1, 6))
    + r"\s*",
    re.DOTALL,
)


class BadRecord(DataError):
    """A record that does not fit its format, as readers raise it: the message does not say where.

    `load_examples` raises a DataError in its place, whose message begins with file and line.
    """


@dataclass
class Record:
    """A record, read in its format."""

    fields: dict[str, str]
    """What templates may name; `prompt` is the whole prompt as published."""
    scores: list[float] = field(default_factory=list)
    """Score annotations; their mean is the label."""
    critiques: list[str] = field(default_factory=list)
    """Critiques; one per score, or any number where there is one score. What is no text is an error only where
    critiques are needed, which `load_examples` knows."""
    messages: list[dict[str, str]] | None = None
    """The prompt as chat messages (`role`, `content`), which the template `plain` takes as they are."""
    id: str | None = None
    """Unique within the data set; None: made from the file's name and the record's number."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further columns, for slicing results; never shown to the judge."""

    @property
    def label(self) -> float:
        """The mean annotation; NaN if there is none, infinite if their sum is beyond float64."""
        try:
            return fmean(self.scores) if self.scores else math.nan
        except OverflowError:
            return math.inf

    @property
    def cot(self) -> str | None:
        """The critique whose score is nearest to the label; the first of equally near ones."""
        if self.scores and len(self.critiques) == len(self.scores):
            return _nearest(self.scores, self.critiques, self.label)
        return self.critiques[0] if self.critiques else None


def read_prompt(record: Mapping[str, Any]) -> Record:
    """What a judge is asked by a plain record: `prompt` or `messages` (or whatever fields the template names), `id`.

    Reads neither label nor critique, which other columns may be called.
    """
    messages, name = record.get("messages"), record.get("id")
    return Record(
        fields=_texts(record),
        messages=None if messages is None else _messages(messages),
        id=None if name is None else str(name),
        meta={key: value for key, value in record.items() if key not in ("prompt", "messages", "id")},
    )


def read_jsonl(record: Mapping[str, Any], score: str = "label") -> Record:
    """Plain records: `prompt` or `messages` (or whatever fields the template names), `label`, `cot`, `id`.

    The column `score` may hold a list of annotations; it is optional, as are `cot` and `id`.
    """
    result = read_prompt(record)
    cot = record.get("cot")
    result.scores = _scores(record, score)
    result.critiques = [] if cot is None else [cot]
    result.meta = {key: value for key, value in result.meta.items() if key not in (score, "cot")}
    return result


def read_feedback(record: Mapping[str, Any], score: str = "orig_score") -> Record:
    """Feedback Collection and Feedback Bench: `instruction` (the prompt), `orig_*`, `orig_score`, `orig_feedback`.

    `score` names the label's column: `orig_score` on the hub; files of the Prometheus repository have `gpt4_score`. The
    critique is also found before `[RESULT]` in `output`.
    """
    scores = _scores(record, score)
    critique = record.get("orig_feedback")
    if not critique and isinstance(record.get("output"), str):
        critique = record["output"].partition(RESULT)[0].strip().removeprefix("Feedback:")
    if isinstance(critique, str):
        critique = critique.strip()
    return Record(
        fields=_prometheus_fields(record),
        scores=scores,
        critiques=[critique] if critique else [],
        meta={key: record[key] for key in ("orig_criteria",) if record.get(key)},
    )


def read_evaluation(record: Mapping[str, Any], score: str = "gpt4_score") -> Record:
    """Prometheus evaluation records: `idx`, `response_source`, `category`, `instruction`, lists of annotations.

    `score` names the column whose mean is the label. Critiques are GPT-4's, each with its own score.
    """
    feedback = record.get("gpt4_feedback") or []
    feedback = list(feedback) if isinstance(feedback, list) else [feedback]
    scores = _scores(record, score)
    result = Record(fields=_prometheus_fields(record), scores=scores)
    given = _scores(record, "gpt4_score")
    if score == "gpt4_score" or len(given) != len(feedback):
        result.critiques = feedback
    elif scores and given:
        result.critiques = [_nearest(given, feedback, result.label)]  # label: the humans'
    kept = ("idx", "response_source", "category", "gpt4_score", "human_score")
    result.meta = {key: record[key] for key in kept if record.get(key) is not None}
    return result


Reader = Callable[[Mapping[str, Any]], Record]


@dataclass(frozen=True)
class Format:
    """A record format that `data.*.format` can name."""

    read: Callable[..., Record]
    needs_label: bool = False
    """A record without scores is an error; else it is left out and counted."""
    score: str | None = None
    """The label's column where `data.*.score` names none; the reader gets its name as `score`. None: the reader takes a
    record alone, and the column cannot be chosen."""

    def reader(self, column: str | None) -> Reader:
        """The reader that takes labels from `column`; from its own where that is None."""
        return self.read if column is None else partial(self.read, score=column)


FORMATS: Registry[Format] = Registry("record format", "data.*.format")


def register_format(
    name: str, *, needs_label: bool = False, score: str | None = None
) -> Callable[[Callable[..., Record]], Callable[..., Record]]:
    """Decorator that adds a reader, a function of one record that returns a `Record`, as the format `name`.

    needs_label: a record without scores is an error; else it is left out and counted
    score: the column of the label, for a reader that has a second argument `score`, the name of this column: users
        choose another with `data.*.score`
    """
    module = calling_module()

    def register(read: Callable[..., Record]) -> Callable[..., Record]:
        FORMATS.register(name, Format(read, needs_label, score), module)
        return read

    return register


def find_format(name: str) -> Format:
    """The format of a plain name, or of `module:name`: what that module registers, or its attribute, a reader.

    Raises ConfigError for an unknown name or module.
    """
    found = FORMATS.find(name)
    if isinstance(found, Format):
        return found
    if not callable(found):
        raise ConfigError(f"{FORMATS.key}: {name!r} is a {type(found).__name__}, not a reader of records")
    return Format(found)


register_format("jsonl", needs_label=True, score="label")(read_jsonl)
for _name in ("feedback_collection", "feedback_bench"):
    register_format(_name, score="orig_score")(read_feedback)
# FLASK too: the papers' numbers are agreements with GPT-4's scores unless they say otherwise.
for _name in ("flask", "vicuna_bench", "mt_bench"):
    register_format(_name, score="gpt4_score")(read_evaluation)


def score_columns(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns that could be a label: those where some record has a number, or numbers."""
    return sorted({key for record in records for key in record if _is_annotated(record, key)})


def sections(prompt: str) -> dict[str, str]:
    """The sections of a finished Prometheus prompt, under the column names of Feedback Collection.

    Only those that are found: a prompt without a reference answer has no `orig_reference_answer`. A heading inside a
    section, as when a judge's prompt is judged, does not end it: the order of the headings decides. Texts are as they
    stand there, without the blank line that precedes the next heading.
    """
    found: list[tuple[str, int, int]] = []
    for heading, name in HEADINGS.items():
        text = f"###{heading}:\n"
        # The instruction comes first; what follows it is searched from the end.
        start = prompt.find(text) if name == "orig_instruction" else prompt.rfind(text)
        if start >= 0 and (not found or start >= found[-1][2]):
            found.append((name, start, start + len(text)))
    if not found:
        return {}
    end = prompt.rfind("###Feedback:")
    stops = [start for _, start, _ in found[1:]] + [end if end >= 0 else len(prompt)]
    texts = {name: prompt[begin:stop].removesuffix("\n\n") for (name, _, begin), stop in zip(found, stops, strict=True)}
    rubric = RUBRIC.fullmatch(texts.get("score_rubric", ""))
    return texts | (rubric.groupdict() if rubric else {})


def _nearest(scores: list[float], critiques: list[str], label: float) -> str:
    """The critique whose score is nearest to the label; the first of equally near ones."""
    return min(zip(scores, critiques, strict=True), key=lambda pair: abs(pair[0] - label))[1]


def _prometheus_fields(record: Mapping[str, Any]) -> dict[str, str]:
    """The columns, and from the finished prompt in `instruction`, where there is one, what they lack."""
    texts, instruction = _texts(record), record.get("instruction")
    if isinstance(instruction, str) and instruction.strip():
        prompt = instruction.strip().rstrip('",').rstrip()
        return {**sections(prompt), **texts, "prompt": prompt}
    if not any(name in texts for name in HEADINGS.values()):
        raise BadRecord(
            "no text in 'instruction', the finished prompt, and none of its parts in 'orig_*'; is data.*.format right "
            "for this file?"
        )
    return texts


def _texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Columns that a template may name: texts, and numbers as they are written."""
    plain = (str, int, float)
    return {k: str(v) for k, v in record.items() if isinstance(v, plain) and not isinstance(v, bool)}


def _scores(record: Mapping[str, Any], key: str) -> list[float]:
    """A number, a text that is one, or a list of them; empty where the record has none."""
    value = record.get(key)
    values = value if isinstance(value, list) else [value]
    return [_number(item, key) for item in values if item is not None]


def _is_annotated(record: Mapping[str, Any], key: str) -> bool:
    try:
        return bool(_scores(record, key))
    except BadRecord:
        return False


def _number(value: Any, key: str) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = math.nan if isinstance(value, str) and "_" in value else float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise BadRecord(f"{key!r} is {shown(value)}; it must be a finite number, or a list of them")


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("'messages' must be a list of objects with 'role' and 'content'")
    for message in messages:
        fits = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits:
            raise BadRecord(f"a message is {shown(message)}; each needs the texts 'role' and 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def shown(value: Any) -> str:
    """A value for a message, not longer than a line."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"

"""Record formats of judge data: each reads a record as fields of a prompt, score annotations and a critique.

A format is a reader under a name of `data.*.format`, added with `register_format`, or named as `module:name`. A reader

- gets one record, a mapping of column names to JSON values, exactly as it stands in the file;
- returns a `Record`; one without scores has no label: `load_examples` leaves it out, counts and logs it (for `jsonl` it
  is an error);
- raises `BadRecord` with a message that says what is wrong and how to fix it; the place is added by the caller. Any
  other exception is a bug of the reader and ends the run with its traceback.

The published formats here are those of Prometheus (prometheus-eval, MIT and CC-BY-4.0 licences; Kim et al., arXiv
2310.08491 and 2405.01535). Feedback Collection and Feedback Bench hold one score per record, with the prompt's parts in
columns `orig_*`; the evaluation files of FLASK, Vicuna Bench and MT Bench hold the finished prompt in `instruction` and
several annotations in `gpt4_score` (FLASK also `human_score`). Their evaluation averages the annotations of a record,
leaves out records without any, and strips surrounding white space and a stray `",` from `instruction`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

from real_megatron.errors import DataError
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
    """Critiques; one per score, or any number where there is one score."""
    messages: list[dict[str, str]] | None = None
    """The prompt as chat messages (`role`, `content`), which the template `plain` takes as they are."""
    id: str | None = None
    """Unique within the data set; None: made from the file's name and the record's number."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Further columns, for slicing results; never shown to the judge."""

    @property
    def label(self) -> float:
        """The mean annotation; NaN if there is none."""
        return fmean(self.scores) if self.scores else math.nan

    @property
    def cot(self) -> str | None:
        """The critique whose score is nearest to the label; the first of equally near ones."""
        if self.scores and len(self.critiques) == len(self.scores):
            return _nearest(self.scores, self.critiques, self.label)
        return self.critiques[0] if self.critiques else None


def read_jsonl(record: Mapping[str, Any]) -> Record:
    """Plain records: `prompt` or `messages` (or whatever fields the template names), `label`, `cot`, `id`.

    `label` may be a list of annotations; it is optional, as are `cot` and `id`.
    """
    known = ("prompt", "messages", "label", "cot", "id")
    messages = record.get("messages")
    cot = record.get("cot")
    if cot is not None and not isinstance(cot, str):
        raise BadRecord(f"'cot' is {cot!r}; it must be a string")
    name = record.get("id")
    return Record(
        fields=_texts(record),
        scores=_scores(record, "label"),
        critiques=[] if cot is None else [cot],
        messages=None if messages is None else _messages(messages),
        id=None if name is None else str(name),
        meta={key: value for key, value in record.items() if key not in known},
    )


def read_feedback(record: Mapping[str, Any]) -> Record:
    """Feedback Collection and Feedback Bench: `instruction` (the prompt), `orig_*`, `orig_score`, `orig_feedback`.

    Files of the Prometheus repository have `gpt4_score`, one number, in place of `orig_score`; the critique is also
    found before `[RESULT]` in `output`.
    """
    key = "orig_score" if record.get("orig_score") is not None else "gpt4_score"
    scores = _scores(record, key)
    critique = record.get("orig_feedback")
    if not critique and isinstance(record.get("output"), str):
        critique = record["output"].partition(RESULT)[0].strip().removeprefix("Feedback:")
    return Record(
        fields=_prometheus_fields(record),
        scores=scores,
        critiques=[critique.strip()] if isinstance(critique, str) and critique.strip() else [],
        meta={key: record[key] for key in ("orig_criteria",) if record.get(key)},
    )


def read_evaluation(record: Mapping[str, Any], score: str = "gpt4_score") -> Record:
    """Prometheus evaluation records: `idx`, `response_source`, `category`, `instruction`, lists of annotations.

    `score` names the column whose mean is the label. Critiques are GPT-4's, each with its own score.
    """
    feedback = record.get("gpt4_feedback") or []
    feedback = [feedback] if isinstance(feedback, str) else list(feedback)
    scores = _scores(record, score)
    if not all(isinstance(text, str) for text in feedback):
        raise BadRecord("'gpt4_feedback' holds something other than strings")
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
R = TypeVar("R", bound=Reader)
FORMATS: Registry[Reader] = Registry("record format", "data.*.format")
for _name, _read in (
    ("jsonl", read_jsonl),
    ("feedback_collection", read_feedback),
    ("feedback_bench", read_feedback),
    ("flask", read_evaluation),
    ("vicuna_bench", read_evaluation),
    ("mt_bench", read_evaluation),
):
    FORMATS.register(_name, _read, __name__)


def register_format(name: str) -> Callable[[R], R]:
    """A decorator that adds a reader (see the module's docstring) as the format `name`."""
    module = calling_module()

    def register(read: R) -> R:
        FORMATS.register(name, read, module)
        return read

    return register


def sections(prompt: str) -> dict[str, str]:
    """The sections of a finished Prometheus prompt, under the column names of Feedback Collection.

    Only those that are found: a prompt without a reference answer has no `orig_reference_answer`. A heading inside a
    section, as when a judge's prompt is judged, does not end it: the order of the headings decides.
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
    texts = {name: prompt[begin:stop].strip() for (name, _, begin), stop in zip(found, stops, strict=True)}
    rubric = RUBRIC.fullmatch(texts.get("score_rubric", ""))
    return texts | (rubric.groupdict() if rubric else {})


def _nearest(scores: list[float], critiques: list[str], label: float) -> str:
    """The critique whose score is nearest to the label; the first of equally near ones."""
    return min(zip(scores, critiques, strict=True), key=lambda pair: abs(pair[0] - label))[1]


def _prometheus_fields(record: Mapping[str, Any]) -> dict[str, str]:
    instruction = record.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise BadRecord("no text in 'instruction', the finished prompt; is data.*.format right for this file?")
    prompt = instruction.strip().rstrip('",').rstrip()
    return {**sections(prompt), **_texts(record), "prompt": prompt}


def _texts(record: Mapping[str, Any]) -> dict[str, str]:
    """Columns that a template may name: texts, and numbers as they are written."""
    plain = (str, int, float)
    return {k: str(v) for k, v in record.items() if isinstance(v, plain) and not isinstance(v, bool)}


def _scores(record: Mapping[str, Any], key: str) -> list[float]:
    """A number, a text that is one, or a list of them; empty where the record has none."""
    value = record.get(key)
    values = value if isinstance(value, list) else [value]
    return [_number(item, key) for item in values if item is not None]


def _number(value: Any, key: str) -> float:
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise BadRecord(f"{key!r} is {value!r}; it must be a finite number, or a list of them")


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRecord("'messages' must be a list of objects with 'role' and 'content'")
    for message in messages:
        fits = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits:
            raise BadRecord(f"a message is {message!r}; each needs the texts 'role' and 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]

"""Judge examples from data sets."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from real_megatron.config import DataSource
from real_megatron.data.example import JudgeExample
from real_megatron.data.files import read_records
from real_megatron.data.formats import READERS, BadRecord, Record, read_jsonl
from real_megatron.data.template import PLAIN, Template, load_template

logger = logging.getLogger(__name__)


def load_examples(
    source: DataSource, template: str | Template = PLAIN, values: Sequence[float] | None = None
) -> list[JudgeExample]:
    """All examples of a data set, their prompts written with `template` (a built-in name, a file, or a Template).

    Several annotations of one record are averaged, as Prometheus' and TRACT's evaluations do; FLASK's label is the
    humans' where the file has their scores, else GPT-4's. Records of published formats without any annotation are
    left out as there, counted and logged. `values` are the scale's numeric values: a label outside of their range is
    an error.

    Raises ValueError, naming file and row and the mend, at the first record that does not fit.
    """
    template = load_template(template)
    records = list(read_records(source))
    read = READERS[source.format]
    if source.format == "flask":
        score = "human_score" if any(record.get("human_score") for _, record in records) else "gpt4_score"
        logger.info("%s: labels are the mean of %s", source.path, score)
        read = partial(read, score=score)
    examples: list[JudgeExample] = []
    places: dict[str, str] = {}
    unlabelled = 0
    for number, (where, record) in enumerate(records, 1):
        example = _example(record, read, template, where, f"{Path(source.path).stem}-{number}")
        if not example.has_label:
            if source.format == "jsonl":
                raise ValueError(f"{where}: no 'label'; training and evaluation need one in every record")
            unlabelled += 1
            continue
        if values is not None and not min(values) <= example.label <= max(values):
            raise ValueError(
                f"{where}: label {example.label:g} is outside of the score scale [{min(values):g}, {max(values):g}]; "
                "correct the label or configure scale.scores and scale.values"
            )
        if example.id in places:
            raise ValueError(f"{where}: id {example.id!r} was given before, in {places[example.id]}; make ids unique")
        places[example.id] = where
        examples.append(example)
    if unlabelled:
        logger.warning("%s: left out %d records without any score annotation", source.path, unlabelled)
    if not examples:
        raise ValueError(f"{source.path}: no usable record; is the file complete, and its format {source.format}?")
    logger.info("%s: %d examples", source.path, len(examples))
    return examples


def example_from_record(
    record: Mapping[str, Any], template: str | Template, where: str, default_id: str
) -> JudgeExample:
    """One plain JSONL record as an example; label and critique are optional.

    For callers that go through a file themselves and survive bad rows. Raises ValueError that begins with `where`.
    """
    return _example(record, read_jsonl, load_template(template), where, default_id)


def _example(
    record: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], Record],
    template: Template,
    where: str,
    default_id: str,
) -> JudgeExample:
    try:
        parsed = read(record)
    except BadRecord as error:
        raise ValueError(f"{where}: {error}") from None
    if parsed.messages is not None and template.name == PLAIN:
        messages = parsed.messages
    else:
        missing = [name for name in template.fields if name not in parsed.fields]
        if missing:
            have = ", ".join(sorted(parsed.fields)) or "none"
            raise ValueError(
                f"{where}: template {template.name!r} needs {', '.join(map(repr, missing))}, the record has the text "
                f"fields: {have}; choose another data.template or add what is missing"
            )
        messages = [{"role": "user", "content": template.render(parsed.fields)}]
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{where}: the prompt is empty; give it a text or remove the record")
    return JudgeExample(parsed.id or default_id, messages, parsed.label, parsed.cot, parsed.meta)

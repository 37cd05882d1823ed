"""Judge examples from data sets."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_megatron.config import DataSource
from real_megatron.data.columns import map_columns
from real_megatron.data.critiques import without_end
from real_megatron.data.example import JudgeExample
from real_megatron.data.files import read_records
from real_megatron.data.formats import BadRecord, Reader, find_format, read_prompt, score_columns, shown
from real_megatron.data.labels import aspect_labels, label_names
from real_megatron.data.record import naming, plain_record
from real_megatron.data.template import PLAIN, Template, load_template
from real_megatron.errors import ConfigError, DataError
from real_megatron.scores import Aspect, weighted_mean

logger = logging.getLogger(__name__)


def label_column(source: DataSource) -> str | None:
    """The column whose mean is the label: `source.score`, else its format's own; None where the reader decides.

    Raises ConfigError for an unknown format, and where the reader decides but `source.score` chooses a column, or
    `source.labels` would map it.
    """
    own = find_format(source.format).score
    if source.score is not None and own is None:
        raise ConfigError(
            f"data.*.score: the format {source.format} has no choice of the label's column; remove {source.score!r}"
        )
    if source.labels and own is None:
        raise ConfigError(
            f"data.*.labels: the format {source.format} does not say which column holds the labels; remove labels and "
            'map them in its reader, or register it with score="COLUMN"'
        )
    return own if source.score is None else source.score


def load_examples(
    source: DataSource,
    template: str | Template = PLAIN,
    values: Sequence[float] | None = None,
    keep: Sequence[str] = (),
    critiques: bool = True,
    aspects: Sequence[Aspect] = (),
) -> list[JudgeExample]:
    """All examples of a data set, their prompts written with `template` (a built-in name, a file, or a Template).

    Several annotations of one record are averaged, as Prometheus' and TRACT's evaluations do; `source.score` chooses
    their column (`label_column`). Records without any annotation are left out, counted and logged, as in those
    evaluations; in a format that needs labels, such as plain JSONL, they are an error, as is a file in which no record
    has the column. `values` are the scale's numeric values: a label outside their range is an error. Critiques end
    before their own score statement (`source.score_statement`, `source.critique_end`); cut ones are counted and logged.
    `keep` names columns, or fields that the format makes, which must be in `meta` beside what the format puts there.
    Without `critiques` those of the records are left alone, whatever they are: `cot` is None. With `aspects` the
    column of the label holds that of each (`aspect_labels`).

    Raises DataError, naming file, row and the fix, at the first record that does not fit, and ConfigError for an
    unknown format or template.
    """
    template = load_template(template)
    format = find_format(source.format)
    column = label_column(source)
    if aspects and column is None:
        raise ConfigError(
            f"scale.aspects: the format {source.format} does not say which column holds the labels; register it with "
            'score="COLUMN"'
        )
    named = [] if column is None else label_names(column, aspects)
    records = map_columns(source, list(read_records(source)), named)
    if named and records and all(record.get(name) is None for _, record in records for name in named):
        found = ", ".join(score_columns(record for _, record in records)) or "none"
        present = ", ".join(dict.fromkeys(repr(name) for _, record in records for name in record))
        raise DataError(
            f"{source.path}: no record has {column!r}, the label's column; columns with numbers: {found}; name one of "
            f"them in data.*.score, or give the file that has scores (its columns are {present[:300]})"
        )
    read = format.reader(column)
    # A name that is not UTF-8 comes as surrogates, which no file of results can hold.
    name = Path(source.path).stem.encode("utf-8", "backslashreplace").decode("utf-8")
    examples: list[JudgeExample] = []
    places: dict[str, str] = {}
    unlabelled = with_critique = cut = emptied = 0
    for number, (where, record) in enumerate(records, 1):
        labels: tuple[float | None, ...] = ()
        if aspects and column is not None:
            labels, record = _of_aspects(where, record, column, aspects)
        example = _example(record, read, template, where, f"{name}-{number}", keep, critiques)
        example.labels = labels
        if not example.has_label:
            if format.needs_label:
                raise DataError(f"{where}: no label; training and evaluation need one in every record")
            unlabelled += 1
            continue
        if not aspects and values is not None and not min(values) <= example.label <= max(values):
            raise DataError(
                f"{where}: label {example.label:g} is outside of the score scale [{min(values):g}, {max(values):g}]; "
                "correct the label or configure scale.scores and scale.values"
            )
        if example.id in places:
            raise DataError(f"{where}: id {example.id!r} was given before, in {places[example.id]}; make ids unique")
        places[example.id] = where
        if example.cot is not None:
            before, example.cot = example.cot, _ended(example.cot, source, values)
            with_critique += 1
            cut += example.cot != before
            emptied += bool(before.strip()) and not example.cot.strip()
        examples.append(example)
    if cut:
        logger.info(
            "%s: cut the end of %d of %d critiques, which said the score; %d had nothing else (score_statement, "
            "critique_end)",
            source.path,
            cut,
            with_critique,
            emptied,
        )
    if unlabelled:
        logger.warning("%s: left out %d records without any score annotation", source.path, unlabelled)
    if not examples:
        raise DataError(f"{source.path}: no usable record; is the file complete, and its format {source.format}?")
    logger.info("%s: %d examples", source.path, len(examples))
    return examples


def example_from_record(
    record: Mapping[str, Any], template: str | Template, where: str, default_id: str
) -> JudgeExample:
    """The prompt of one plain JSONL record as an example without label and critique: judging needs neither, and columns
    of these names are not read.

    For callers that read a file themselves and continue after bad rows. Raises a DataError that begins with `where`.
    """
    with naming(where):
        plain = plain_record(record)
    return _example(plain, read_prompt, load_template(template), where, default_id)


def _of_aspects(
    where: str, record: Mapping[str, Any], column: str, aspects: Sequence[Aspect]
) -> tuple[tuple[float | None, ...], dict[str, Any]]:
    """The labels of a record, and the record with their mean by weight as its label."""
    try:
        labels = aspect_labels(record, column, aspects)
    except BadRecord as error:
        raise DataError(f"{where}: {error}") from None
    overall = None if all(label is None for label in labels) else weighted_mean(aspects, labels)
    return labels, {**record, column: overall}


def _ended(critique: str, source: DataSource, values: Sequence[float] | None) -> str:
    return without_end(critique, source.critique_end, source.score_statement == "cut", values)


def _example(
    record: Mapping[str, Any],
    read: Reader,
    template: Template,
    where: str,
    default_id: str,
    keep: Sequence[str] = (),
    critiques: bool = True,
) -> JudgeExample:
    try:
        parsed = read(record)
    except BadRecord as error:
        raise DataError(f"{where}: {error}") from None
    bad = [critique for critique in parsed.critiques if not isinstance(critique, str)]
    if critiques and bad:
        raise DataError(f"{where}: the critique is {shown(bad[0])}; it must be a text")
    if parsed.messages is not None and template.name == PLAIN:
        messages = parsed.messages
    else:
        missing = [name for name in template.fields if name not in parsed.fields]
        if missing:
            have = ", ".join(sorted(parsed.fields)) or "none"
            raise DataError(
                f"{where}: template {template.name!r} needs {', '.join(map(repr, missing))}, the record has the text "
                f"fields: {have}; choose another data.template or add what is missing"
            )
        messages = [{"role": "user", "content": template.render(parsed.fields)}]
    if not any(message["content"].strip() for message in messages):
        raise DataError(f"{where}: the prompt is empty; give it a text or remove the record")
    if math.isinf(parsed.label):
        raise DataError(f"{where}: the label, the mean of {len(parsed.scores)} annotations, is infinite; correct them")
    meta = {**parsed.fields, **parsed.meta, **record}
    kept = {key: meta[key] for key in ("group", *keep) if meta.get(key) is not None}
    if missing := [key for key in keep if key not in kept]:
        raise DataError(
            f"{where}: no value in the column {missing[0]!r}, by which data.eval has rows belong together; the columns "
            f"are {', '.join(record)}; name another or complete it"
        )
    cot = parsed.cot if critiques else None
    return JudgeExample(parsed.id or default_id, messages, parsed.label, cot, {**parsed.meta, **kept})

"""Score a JSONL file of any length with a judge: streaming, resumable, and not stopped by bad rows."""

import codecs
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from real_megatron.data.record import parse_json, plain_record
from real_megatron.errors import ConfigError, DataError, PromptRefused
from real_megatron.files import append, writing
from real_megatron.judging.evaluate import judge_settings
from real_megatron.judging.job import keep_settings, template_digest, weights_written
from real_megatron.judging.judge import Judge
from real_megatron.judging.reading import Reading
from real_megatron.locks import only_writer

logger = logging.getLogger(__name__)

Report = Callable[[int, str | None, str], None]
"""(line of the input, id, what is wrong) of a bad row."""
RESULT = (
    *("score", "score_renormalized", "score_mass", "distribution", "sampled_score"),
    *("critique", "no_anchor", "truncated"),
)
"""Fields of an output row, in this order, as `Score` describes them."""


@dataclass
class JudgeSummary:
    """What happened to the rows of the input."""

    judged: int = 0
    """Written to the output, by this run."""
    skipped: int = 0
    """In the output already, from an earlier run."""
    bad: int = 0
    """Reported in the errors file."""
    no_anchor: int = 0
    """Critiques that did not come to the anchor."""
    truncated: int = 0
    """Of these, those that were cut at `data.max_response_tokens`."""
    cut: int = 0
    """Rows whose prompt lost its beginning (`data.long_prompts: cut_left`), of those that this run read."""
    repeated: int = 0
    """Rows that stood in the output more than once: all but the first were removed."""


@dataclass(frozen=True)
class _Row:
    number: int
    """Line of the input, from 1."""
    id: str
    digest: str
    """Of the line, so that a changed row is not taken for one that is judged."""
    prompt_ids: list[int]
    kept: dict[str, Any] = field(default_factory=dict)
    """Fields of the input that the output row has, too."""


def errors_path(output: Path) -> Path:
    """Where the bad rows of the job that writes `output` are reported."""
    return output.with_name(output.name + ".errors.jsonl")


def judge_file(
    judge: Judge,
    source: Path,
    output: Path,
    on_progress: Callable[[JudgeSummary], None] | None = None,
    keep_fields: Sequence[str] = (),
) -> JudgeSummary:
    """Judge each row of `source` (JSONL) and append a row to `output`. A row has, in this order:

    - `id`: the input's `id` as text, else `line N`
    - the fields that `keep_fields` names, with the input's values
    - `score`, `score_renormalized`, `score_mass`, `distribution`, `sampled_score`, `critique`, `no_anchor`,
      `truncated`: as `Score` describes them; null where no critique came to a score
    - `aspects`, where the scale has some: what `AspectScore` has of each, by name
    - `samples`, where there are several critiques (`evaluation.samples`): a list of these fields for each; the row's
      own numbers are their means, its critique, `no_anchor` and `truncated` the first one's
    - `row`: a digest of the input's line

    Rows whose id is in the output are skipped, so a job that was killed is resumed by the same call; a line cut short
    by the kill is removed and judged again, and an id that occurs twice, as two jobs at once have left it, keeps its
    first row (counted in `repeated`, logged). Each batch of `evaluation.batch_size` rows is on disk before the next
    begins. Bad rows (no JSON object, no prompt, too long, without a field of `keep_fields`, an id seen before, judged
    when it read differently) go to `errors_path(output)` with line and reason; each run writes that file anew, since it
    tries those rows again. The judge's settings, the fields of a row and the input's path are kept beside the output.

    Raises ConfigError when another job writes `output` (`only_writer`), when it was begun with other settings or other
    fields or is damaged, or when a field to keep has a name that the row has itself; OSError when a file cannot be read
    or written, EngineError when the engine fails or the model cannot score. What is finished then stays on disk.
    """
    kept = fields_to_keep(keep_fields)
    with only_writer(output):
        return _judge_file(judge, source, output, on_progress, kept)


def _judge_file(
    judge: Judge,
    source: Path,
    output: Path,
    on_progress: Callable[[JudgeSummary], None] | None,
    kept: Sequence[str],
) -> JudgeSummary:
    cut_before = judge.prompts_cut
    begun = output.exists() and output.stat().st_size > 0
    keep_settings(output, {**_about(judge), "input": str(source.resolve()), "fields": [*kept, *RESULT]}, begun)
    done, repeated = _finished(output)
    summary = JudgeSummary(repeated=repeated)
    errors_path(output).unlink(missing_ok=True)
    # Without buffers, which would meet a full disk again when they are closed.
    with (
        source.open("rb") as lines,
        output.open("ab", buffering=0) as out,
        errors_path(output).open("wb", buffering=0) as errors,
    ):

        def report(number: int, id: str | None, error: str) -> None:
            summary.bad += 1
            _write(errors, {"line": number, "id": id, "error": error})

        def flush(rows: list[_Row]) -> None:
            for row, readings in _judged(judge, rows, report):
                _write(out, {"id": row.id, **row.kept, **_result(judge, readings), "row": row.digest})
                summary.judged += 1
                summary.no_anchor += sum(r.no_anchor for r in readings)
                summary.truncated += sum(r.truncated for r in readings)
            _sync(out)
            _sync(errors)
            if on_progress is not None:
                on_progress(summary)

        seen: set[str] = set()
        waiting: list[_Row] = []
        for number, line in _numbered(lines):
            id, digest = None, hashlib.blake2b(line, digest_size=8).hexdigest()
            try:
                record = plain_record(parse_json(line.decode("utf-8", "surrogateescape")))
                id = str(record["id"]) if record.get("id") is not None else f"line {number}"
                if id in seen:
                    raise DataError(f"the id {id!r} occurs in an earlier row; give every row its own")
                seen.add(id)
                if id in done:
                    if done[id] != digest:
                        raise DataError(
                            f"the row {id!r} read differently when it was judged; remove its line from {output} to "
                            "have it judged anew, or choose another output"
                        )
                    summary.skipped += 1
                    continue
                waiting.append(_Row(number, id, digest, judge.encode(record, "row"), _taken(record, kept)))
            except DataError as error:
                report(number, id, str(error))
            if len(waiting) == judge.config.evaluation.batch_size:
                flush(waiting)
                waiting = []
        if waiting:
            flush(waiting)
    summary.cut = judge.prompts_cut - cut_before
    if summary.cut:
        logger.warning("%s: cut the beginning of %d prompts", source, summary.cut)
    if not summary.bad:
        errors_path(output).unlink()
    else:
        logger.warning("%s: %d bad rows, see %s", source, summary.bad, errors_path(output))
    return summary


def count_rows(source: Path) -> int:
    """Rows of a JSONL file. Raises DataError when it cannot be read or has none."""
    try:
        with source.open("rb") as lines:
            rows = sum(1 for line in lines if line.strip())
    except OSError as error:
        raise DataError(f"{source}: the input cannot be read ({error.strerror}); name a JSONL file") from None
    if not rows:
        raise DataError(f"{source}: the input has no rows; is the file complete?")
    return rows


def _numbered(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line.strip()


def _judged(judge: Judge, rows: list[_Row], report: Report) -> Iterator[tuple[_Row, list[Reading]]]:
    """Each row with its readings. A row whose prompt the engine refuses is reported, and the others are asked again."""
    while rows:
        try:
            readings = judge.read([row.prompt_ids for row in rows], [row.id for row in rows])
        except PromptRefused as refusal:
            refused = rows[refusal.index]
            report(refused.number, refused.id, str(refusal))
            rows = [row for row in rows if row is not refused]
        else:
            yield from zip(rows, readings, strict=True)
            return


def _result(judge: Judge, readings: list[Reading]) -> dict[str, Any]:
    row = asdict(judge.summary(readings))
    samples = row.pop("samples")
    for sample in samples:
        del sample["samples"]
    several = ("aspects",) if judge.scale.aspects else ()
    for one in () if several else samples:
        del one["aspects"]
    return {key: row[key] for key in (*RESULT, *several)} | ({"samples": samples} if samples else {})


def fields_to_keep(names: Sequence[str]) -> list[str]:
    """The fields that output rows get from the input, besides `id`, which every row has.

    Raises ConfigError for a name that the row has itself.
    """
    own = [name for name in names if name in (*RESULT, "aspects", "samples", "row")]
    if own:
        raise ConfigError(
            f"keep_fields: {own[0]!r} is a field of the output row itself; give the input's column another name"
        )
    return [name for name in dict.fromkeys(names) if name != "id"]


def _taken(record: dict[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The fields of a row that its output row has, too."""
    for name in kept:
        if name not in record:
            raise DataError(f"no field {name!r}, which keep_fields names; the fields are {', '.join(record)}")
        try:
            json.dumps(record[name], allow_nan=False)
        except ValueError:
            raise DataError(f"{name!r}, which keep_fields names, holds NaN or Infinity, which are no JSON") from None
    return {name: record[name] for name in kept}


def _about(judge: Judge) -> dict[str, Any]:
    """What decides the output, as plain data."""
    data, settings = judge.config.data, judge_settings(judge)
    return {
        "model": judge.name,
        "weights_written": None if judge.directory is None else weights_written(judge.directory),
        "template": data.template,
        "template_digest": template_digest(data.template),
        "chat_template": data.chat_template,
        "chat_template_args": data.chat_template_args,
        "cut_left_to": data.max_prompt_tokens if data.long_prompts == "cut_left" else None,
        **settings.pop("scale"),
        **settings,
    }


def _finished(output: Path) -> tuple[dict[str, str], int]:
    """Ids in the output, with the digests of their rows, and how many rows had the id of one before.

    These, and a last line that was cut short, are removed from the file.
    """
    done: dict[str, str] = {}
    repeated: set[int] = set()
    if not output.exists():
        return done, 0
    whole = 0
    with output.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                if row["id"] in done:
                    repeated.add(number)
                done.setdefault(row["id"], row["row"])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{output}, line {number}: not a row of this job; remove the line to have its row judged again, or "
                    "choose another output"
                ) from error
            whole += len(line)
    if whole < output.stat().st_size:
        logger.warning("%s: removed a last line that was cut short", output)
        os.truncate(output, whole)
    if repeated:
        logger.warning(
            "%s: removed %d rows whose id stood there before, as two jobs at once leave them (the first: line %d)",
            *(output, len(repeated), min(repeated)),
        )
        _remove_lines(output, repeated)
    return done, len(repeated)


def _remove_lines(file: Path, numbers: set[int]) -> None:
    file = file.resolve()
    fresh = file.with_name(file.name + ".tmp")
    with file.open("rb") as lines, fresh.open("wb") as out:
        out.writelines(line for number, line in enumerate(lines, start=1) if number not in numbers)
        _sync(out)
    os.replace(fresh, file)


def _write(file: BinaryIO, row: dict[str, Any]) -> None:
    # A lone surrogate in an id has no UTF-8 form; `backslashreplace` writes it as the JSON escape that it came from.
    with writing(Path(file.name)):
        append(file.fileno(), (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def _sync(file: BinaryIO) -> None:
    with writing(Path(file.name)):
        file.flush()
        os.fsync(file.fileno())

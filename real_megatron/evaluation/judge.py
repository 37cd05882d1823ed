"""Score a JSONL file of any length with a judge: streaming, resumable, and not stopped by bad rows."""

import codecs
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase

from real_megatron.evaluation.reading import NoAnchorRule, Probabilities, Reading, read
from real_megatron.evaluation.runner import mean_distribution
from real_megatron.rollout.engine import RolloutEngine, SamplingParams
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError

logger = logging.getLogger(__name__)

Encode = Callable[[dict[str, Any]], list[int]]
"""A row's prompt as token ids; raises ValueError, saying what is wrong, for a row that has none."""


@dataclass
class JudgeSummary:
    """What happened to the rows of the input."""

    judged: int = 0
    skipped: int = 0
    """In the output already, from an earlier run."""
    bad: int = 0
    """Reported in the errors file."""
    no_anchor: int = 0
    """Critiques that did not come to the anchor."""


@dataclass(frozen=True)
class _Row:
    number: int
    """Line of the input, from 1."""
    id: str
    digest: str
    """Of the line, so that a changed row is not taken for one that is judged."""
    prompt_ids: list[int]


def errors_path(output: Path) -> Path:
    """Where the bad rows of the job that writes `output` are reported."""
    return output.with_name(output.name + ".errors.jsonl")


def job_path(output: Path) -> Path:
    """Where the settings of the job that writes `output` are kept, so that it is resumed with the same ones."""
    return output.with_name(output.name + ".job.json")


def judge(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    source: Path,
    output: Path,
    encode: Encode,
    params: SamplingParams,
    *,
    seed: int = 0,
    rule: NoAnchorRule = "force",
    probabilities: Probabilities = "full",
    batch: int = 256,
    settings: Mapping[str, Any] | None = None,
    on_progress: Callable[[JudgeSummary], None] | None = None,
) -> JudgeSummary:
    """Judge each row of `source` (JSONL) and append a row to `output`: `id`, `score` (RAIL), `distribution` (score text
    → probability), `sampled_score`, `critique`, `no_anchor`; with several critiques the first three are means,
    `critique` and `no_anchor` are the first one's, and `samples` lists all. `row` is a digest of the input's line.

    A row's id is its `id` field, else `line N`. Rows whose id is in the output are skipped, so a job that was killed is
    resumed by the same call; a line cut short by the kill is removed and judged again. Each batch is on disk before the
    next begins. Bad rows (no JSON object, no prompt, too long, an id seen before, judged when it read differently) go
    to `errors_path(output)` with line and reason; each run writes that file anew, since it tries those rows again.
    `settings` (the model's path, …), the input's path and the arguments are kept in `job_path(output)`. `params.n`
    critiques per row; `batch` rows are judged at a time.

    Raises ConfigError when `output` was begun with other settings or is damaged, OSError when a file cannot be read or
    written, RuntimeError when the engine fails. What is finished then stays on disk.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    more = {**(settings or {}), "input": str(source.resolve())}
    _same_job(output, _settings(params, seed, rule, probabilities, scale, more))
    done = _finished(output)
    ask = partial(read, engine, tokenizer, scale, params=params, seed=seed, rule=rule, probabilities=probabilities)
    summary = JudgeSummary()
    errors_path(output).unlink(missing_ok=True)
    with source.open("rb") as lines, output.open("ab") as out, errors_path(output).open("wb") as errors:

        def report(number: int, id: str | None, error: str) -> None:
            summary.bad += 1
            _write(errors, {"line": number, "id": id, "error": error})

        def flush(rows: list[_Row]) -> None:
            for row, readings in _judged(ask, rows, report):
                _write(out, {"id": row.id, **_result(readings, scale), "row": row.digest})
                summary.judged += 1
                summary.no_anchor += sum(r.no_anchor for r in readings)
            _sync(out)
            _sync(errors)
            if on_progress is not None:
                on_progress(summary)

        seen: set[str] = set()
        waiting: list[_Row] = []
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            line = line.strip()
            if not line:
                continue
            id, digest = None, hashlib.blake2b(line, digest_size=8).hexdigest()
            try:
                record = _parse(line)
                id = str(record["id"]) if record.get("id") is not None else f"line {number}"
                if id in seen:
                    raise ValueError(f"the id {id!r} occurs in an earlier row; give every row its own")
                seen.add(id)
                if id in done:
                    if done[id] != digest:
                        raise ValueError(
                            f"the row {id!r} read differently when it was judged; remove its line from {output} to "
                            "have it judged anew, or choose another output"
                        )
                    summary.skipped += 1
                    continue
                waiting.append(_Row(number, id, digest, encode(record)))
            except (ValueError, KeyError, TypeError) as error:
                report(number, id, f"no field {error}" if isinstance(error, KeyError) else str(error))
            if len(waiting) == batch:
                flush(waiting)
                waiting = []
        if waiting:
            flush(waiting)
    if not summary.bad:
        errors_path(output).unlink()
    else:
        logger.warning("%s: %d bad rows, see %s", source, summary.bad, errors_path(output))
    return summary


def _judged(
    ask: Callable[..., list[list[Reading]]], rows: list[_Row], report: Callable[[int, str | None, str], None]
) -> Iterator[tuple[_Row, list[Reading]]]:
    """Each row with its readings. Where the engine refuses a prompt (mostly: too long), halves find out which one."""
    try:
        readings = ask([row.prompt_ids for row in rows], [row.id for row in rows])
    except ValueError as error:
        if len(rows) == 1:
            report(rows[0].number, rows[0].id, str(error))
            return
        half = len(rows) // 2
        yield from _judged(ask, rows[:half], report)
        yield from _judged(ask, rows[half:], report)
    else:
        yield from zip(rows, readings, strict=True)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    return record


def _result(readings: list[Reading], scale: ScoreScale) -> dict[str, Any]:
    samples = [
        {
            "score": reading.expected,
            "distribution": _distribution(reading.probabilities, scale),
            "sampled_score": reading.sampled,
            "critique": reading.critique,
            "no_anchor": reading.no_anchor,
        }
        for reading in readings
    ]
    if len(samples) == 1:
        return samples[0]
    scored = [reading for reading in readings if reading.probabilities is not None]
    means = {
        "score": fmean(r.expected for r in scored) if scored else None,
        "distribution": _distribution(mean_distribution(scored) if scored else None, scale),
        "sampled_score": fmean(r.sampled for r in scored) if scored else None,
    }
    return {**samples[0], **means, "samples": samples}


def _distribution(probabilities: list[float] | None, scale: ScoreScale) -> dict[str, float] | None:
    return None if probabilities is None else dict(zip(scale.texts, probabilities, strict=True))


def _settings(
    params: SamplingParams,
    seed: int,
    rule: str,
    probabilities: str,
    scale: ScoreScale,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        **more,
        "samples": params.n,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
        "seed": seed,
        "no_anchor_rule": rule,
        "probabilities": probabilities,
        "scores": scale.texts,
        "values": scale.values,
        "anchor": scale.anchor_text,
    }


def _same_job(output: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a new job; refuse to go on with one that was begun with others."""
    settings = json.loads(json.dumps(settings))
    path = job_path(output)
    if not output.exists() or not output.stat().st_size:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    if not path.exists():
        raise ConfigError(f"{output} exists, but {path.name} does not, so it cannot be resumed: choose another output")
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        what = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise ConfigError(f"{output} was begun with other settings ({what}): choose another output, or use the same")


def _finished(output: Path) -> dict[str, str]:
    """Ids in the output, with the digests of their rows; a last line that was cut short is removed from the file."""
    done: dict[str, str] = {}
    if not output.exists():
        return done
    whole = 0
    with output.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                done[row["id"]] = row["row"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{output}, line {number}: not a row of this job; choose another output") from error
            whole += len(line)
    if whole < output.stat().st_size:
        logger.warning("%s: removed a last line that was cut short", output)
        os.truncate(output, whole)
    return done


def _write(file: BinaryIO, row: dict[str, Any]) -> None:
    # A lone surrogate in an id has no UTF-8 form; `backslashreplace` writes it as the JSON escape that it came from.
    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

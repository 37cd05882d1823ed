"""`report.md` with learning curves: several runs compared on several test sets, from the files that runs leave."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from real_megatron.errors import ConfigError, DataError
from real_megatron.evaluation.calibration import calibration, ranges, shares
from real_megatron.evaluation.metrics import LOWER_IS_BETTER, Estimate, paired_difference
from real_megatron.evaluation.plots import evaluation_curves, learning_curves
from real_megatron.evaluation.result import DECODINGS, Evaluation, clusters_of, groups_of
from real_megatron.evaluation.weighted import NAMES, WITHIN

TITLES = {
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "mse": "MSE",
    "mae": "MAE",
    "accuracy": "accuracy",
    "pearson_within": "Pearson within",
    "spearman_within": "Spearman within",
    "kendall_within": "Kendall within",
}
DECODING_TITLES = {"rail": "RAIL", "sampled": "sampled score"}


@dataclass(frozen=True)
class RunResults:
    """One line of the comparison: a run, or a checkpoint that was evaluated."""

    name: str
    metrics: list[dict[str, float]]
    """Rows of metrics.jsonl; empty for a checkpoint."""
    evaluations: list[Evaluation]


def evaluation_path(directory: Path, name: str, step: int | None = None) -> Path:
    """Where the evaluation of test set `name` belongs in a run's (or a report's) directory: `evaluation/NAME.json`, or
    `evaluation/NAME-step-000100.json` within training. `read_run` looks there."""
    suffix = "" if step is None else f"-step-{step:06d}"
    return directory / "evaluation" / f"{name}{suffix}.json"


def run_names(directories: Sequence[Path]) -> list[str]:
    """The directories' own names, with as many of the directories around them as tell them apart."""
    paths = [path.resolve() for path in directories]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"a report compares different runs, not one with itself: {', '.join(map(str, directories))}")
    for length in range(1, max(len(path.parts) for path in paths)):
        names = [_readable("/".join(path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [_readable(str(path)) for path in paths]


def _readable(text: str) -> str:
    """Text without the surrogates by which Python, in a locale that does not know UTF-8, spells the names of files."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def read_run(name: str, directory: Path) -> RunResults:
    """A run's metrics.jsonl and the evaluations in its `evaluation/`. Raises ConfigError when it has neither."""
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; name the output directory of a run")
    metrics = read_metrics(directory / "metrics.jsonl")
    evaluations = [Evaluation.load(path) for path in sorted((directory / "evaluation").glob("*.json"))]
    if not metrics and not evaluations:
        raise ConfigError(f"{directory}: neither metrics.jsonl nor evaluation/*.json is there; nothing to report")
    return RunResults(name, metrics, evaluations)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics.jsonl, null as NaN; [] when the file is absent. A last line cut short by a crash is left out.

    Raises DataError, naming file and line, for any other line that is not a row.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = {key: math.nan if value is None else float(value) for key, value in json.loads(line).items()}
            row["step"] = int(row["step"])
            rows.append(row)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a row of metrics ({error}); remove the line") from error
    return rows


def write_report(
    output: Path, runs: Sequence[RunResults], *, command: Sequence[str] = (), title: str = "Evaluation report"
) -> Path:
    """Write `output`/report.md, curves.png (training) and evaluation.png (test sets over steps), whichever has data;
    returns the path of report.md.

    Of each run and test set the newest evaluation is compared (one without a step counts as newest). Differences are
    to the first run that evaluated the set, paired by example. `command` is what made the report.

    Raises ConfigError when there is no run, or two have the same name.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ConfigError(f"a report needs one or more runs with different names, not {names}")
    output.mkdir(parents=True, exist_ok=True)
    lines = [f"# {_readable(title)}", ""]
    if command:
        lines += ["Made by", "", "    " + _readable(shlex.join(command)), ""]
    sets = list(dict.fromkeys(e.name for run in runs for e in run.evaluations))
    for name in sets:
        newest = {run.name: _newest(run, name) for run in runs}
        lines += _test_set(name, {run: e for run, e in newest.items() if e is not None})
    curves = {run.name: run.metrics for run in runs if run.metrics}
    if curves and learning_curves(output / "curves.png", curves):
        lines += ["## Learning curves", "", "![Training metrics over steps](curves.png)", ""]
    over_steps = {run.name: [e for e in run.evaluations if e.step is not None] for run in runs}
    if evaluation_curves(output / "evaluation.png", over_steps):
        lines += ["## Test sets during training", "", "![Test metrics over steps](evaluation.png)", ""]
    path = output / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8", errors="backslashreplace")
    return path


def _newest(run: RunResults, name: str) -> Evaluation | None:
    own = [e for e in run.evaluations if e.name == name]
    return max(own, key=lambda e: math.inf if e.step is None else e.step, default=None)


def _test_set(name: str, evaluations: Mapping[str, Evaluation]) -> list[str]:
    first = next(iter(evaluations.values()))
    lines = [
        f"## {name}",
        "",
        f"{first.counts['examples']} examples; 95 % bootstrap intervals (BCa) over {_unit(first)}.",
        "",
    ]
    lines += _table(
        ["run", "decoding", "examples", *(TITLES[m] + (" ↓" if m in LOWER_IS_BETTER else "") for m in NAMES)],
        [
            [run, DECODING_TITLES[d], str(_answered(e)), *(cell(e.metrics[d][m]) for m in NAMES)]
            for run, e in evaluations.items()
            for d in DECODINGS
        ],
    )
    grouped = {run: e for run, e in evaluations.items() if e.config.get("within")}
    if grouped:
        columns = ", ".join(dict.fromkeys(f"`{e.config['within']}`" for e in grouped.values()))
        lines += [f"Within {columns}, the mean over its groups of the correlation in each:", ""]
        lines += _table(
            ["run", "decoding", *(TITLES[m] for m in WITHIN)],
            [
                [
                    run,
                    DECODING_TITLES[d],
                    *(cell(e.metrics[d][m]) if m in e.metrics[d] else "undefined" for m in WITHIN),
                ]
                for run, e in grouped.items()
                for d in DECODINGS
            ],
        )
    notes = [
        note
        for run, e in evaluations.items()
        for d in DECODINGS
        for note in _notes(run, DECODING_TITLES[d], e.metrics[d])
    ]
    lines += [*notes, ""] if notes else []
    lines += _differences(evaluations)
    lines += _calibration(evaluations)
    lines += _table(
        [
            "run",
            "step",
            "critiques",
            "without anchor",
            "cut by length",
            "forced",
            "examples without score",
            "tokens",
            "mass on scores",
        ],
        [
            [
                run,
                "–" if e.step is None else str(e.step),
                str(e.counts["responses"]),
                *(_share(e.counts[c], e.counts["responses"]) for c in ("no_anchor", "truncated", "forced")),
                _share(e.counts["unanswered"], e.counts["examples"]),
                f"{e.means['response_tokens']:.1f}",
                f"{e.means['score_mass']:.3f}",
            ]
            for run, e in evaluations.items()
        ],
    )
    return lines + _long_prompts(evaluations) + _settings(evaluations)


def _differences(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """A table of every later run minus the first, on the examples that both answered."""
    (base_name, base), *others = evaluations.items()
    rows, notes = [], []
    for run, e in others:
        for decoding in DECODINGS:
            before = {p.id: p for p in base.predictions if p.rail is not None}
            pairs = [(p, before[p.id]) for p in e.predictions if p.rail is not None and p.id in before]
            if not pairs or any(p.label != b.label for p, b in pairs):
                continue
            difference = paired_difference(
                [getattr(p, decoding) for p, _ in pairs],
                [getattr(b, decoding) for _, b in pairs],
                [p.label for p, _ in pairs],
                e.config["scale"]["values"],
                e.config["bootstrap"],
                e.config["seed"],
                clusters_of([p for p, _ in pairs]),
                groups_of([p for p, _ in pairs]),
            )
            label = f"{run} − {base_name} ({len(pairs)})"
            cells = (cell(difference[m], signed=True) if m in difference else "" for m in (*NAMES, *WITHIN))
            rows.append([label, DECODING_TITLES[decoding], *cells])
            notes += _notes(label, DECODING_TITLES[decoding], difference)
    if not rows:
        return []
    shown = len(NAMES) if not any(any(row[2 + len(NAMES) :]) for row in rows) else len(NAMES) + len(WITHIN)
    header = ["difference (examples)", "decoding", *(TITLES[m] for m in (*NAMES, *WITHIN)[:shown])]
    table = _table(header, [row[: 2 + shown] for row in rows])
    return ["Differences on the same examples, resampled together:", "", *table, *notes, *([""] if notes else [])]


def _calibration(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Tables of how the expected scores lie beside the labels, on average and over the scale."""
    answered = {run: [p for p in e.predictions if p.rail is not None] for run, e in evaluations.items()}
    answered = {run: predictions for run, predictions in answered.items() if predictions}
    if not answered:
        return []
    scales = {run: evaluations[run].config["scale"]["values"] for run in answered}
    rows = []
    for run, predictions in answered.items():
        found = calibration(predictions, scales[run])
        crps = f"{found.crps:.3f}" if math.isfinite(found.crps) else "–"
        rows.append([run, f"{found.bias:+.3f}", f"{found.spread:.3f}", f"{found.error:.3f}", crps])
    lines = ["Calibration of the expected score (RAIL), in units of the score:", ""]
    lines += _table(["run", "mean − label", "spread ÷ labels' spread", "calibration error ↓", "CRPS ↓"], rows)
    values = next(iter(scales.values()))
    if any(other != values for other in scales.values()):
        return lines
    first = next(iter(answered.values()))
    rail = {run: [p.rail for p in predictions if p.rail is not None] for run, predictions in answered.items()}
    columns = {"labels": [p.label for p in first], **rail}
    parts = [name for name, _ in ranges(values)]
    lines += ["Expected scores over the scale:", ""]
    return lines + _table(
        ["", *parts],
        [[run, *(f"{share:.1%}" for share in shares(numbers, values))] for run, numbers in columns.items()],
    )


def _notes(label: str, decoding: str, estimates: Mapping[str, Estimate]) -> list[str]:
    of: dict[str, list[str]] = {}
    for metric, estimate in estimates.items():
        if estimate.note:
            of.setdefault(estimate.note, []).append(TITLES[metric])
    return [f"- {label}, {decoding}, {', '.join(titles)}: {note}." for note, titles in of.items()]


def _unit(evaluation: Evaluation) -> str:
    """What the intervals resample."""
    column = evaluation.config.get("cluster")
    count = len(set(clusters_of([p for p in evaluation.predictions if p.rail is not None])))
    return f"{count} clusters of examples (`{column}`)" if column else "the examples"


def _long_prompts(evaluations: Mapping[str, Evaluation]) -> list[str]:
    counts = [
        (run, e.counts.get("prompts_dropped", 0), e.counts.get("prompts_cut", 0)) for run, e in evaluations.items()
    ]
    lines = [
        f"- {run}: {dropped} dropped, {cut} cut at their beginning." for run, dropped, cut in counts if dropped or cut
    ]
    return ["Prompts beyond the length limit:", "", *lines, ""] if lines else []


def _settings(evaluations: Mapping[str, Evaluation]) -> list[str]:
    lines = ["How the numbers were made:", ""]
    for run, e in evaluations.items():
        c = e.config
        where = "".join(f"{key} `{c[key]}`, " for key in ("model", "run", "command") if c.get(key))
        lines.append(
            f"- {run}: {where}{c['samples']} critique{'s' if c['samples'] > 1 else ''} an example at temperature "
            f"{c['temperature']:g}, top-p {c['top_p']:g}, seed {c['seed']}; a critique without anchor: "
            f"{c['no_anchor_rule']}; {c['probabilities']} probabilities; {c['bootstrap']} resamples of {_unit(e)}."
        )
    return [*lines, ""]


def how_answered(evaluation: Evaluation) -> str:
    """In one sentence, how the answers behind the metrics came about: critiques that were cut or got an anchor
    appended, examples without a score."""
    c, limit = evaluation.counts, evaluation.config.get("max_new_tokens")
    without = f"{c['no_anchor']} of {c['responses']} critiques ({_percent(c['no_anchor'], c['responses'])})"
    unscored = f"{c['unanswered']} of {c['examples']} examples ({_percent(c['unanswered'], c['examples'])})"
    return (
        f"{without} did not come to the anchor: {c['truncated']} were cut at {limit} tokens "
        f"(data.max_response_tokens), {c['forced']} got the anchor appended, and with it a score all the same; "
        f"{unscored} have no score"
    )


def console_table(results: Mapping[str, Evaluation], width: int) -> Table:
    """The metrics of one judge on several test sets, for a terminal of `width` columns: a column a metric, or a line a
    metric where these would not fit. Numbers are never cut.

    `cut` and `forced` are shares of the critiques: those that were cut by length, and those that got an anchor
    appended. `no score` is a share of the examples.
    """
    metrics = [*NAMES, *(m for m in WITHIN if any(m in e.metrics[d] for e in results.values() for d in DECODINGS))]
    title = ", ".join(dict.fromkeys(str(e.config["model"]) for e in results.values() if e.config.get("model")))
    rows: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    """Of a test set and a decoding: value and note, by column."""
    for name, result in results.items():
        c = result.counts
        for decoding in DECODINGS:
            row = rows[f"{name}, by {_unit(result)}", decoding] = {"examples": (str(_answered(result)), "")}
            for metric in metrics:
                estimate = result.metrics[decoding].get(metric)
                row[metric] = ("", "") if estimate is None else (cell(estimate), estimate.note)
            row["cut"] = _percent(c["truncated"], c["responses"]), ""
            row["forced"] = _percent(c["forced"], c["responses"]), ""
            row["no score"] = _percent(c["unanswered"], c["examples"]), ""
    wide = Table("test set", "decoding", "examples", *metrics, "cut", "forced", "no score", title=title)
    for key, row in rows.items():
        wide.add_row(*key, *(f"{value} ({note})" if note else value for value, note in row.values()))
    terminal = Console(width=10_000)
    if Measurement.get(terminal, terminal.options, wide).maximum <= width:
        return wide
    long = Table(title=title)
    long.add_column("test set, metric", overflow="fold")
    long.add_column("decoding", no_wrap=True)
    long.add_column("value", no_wrap=True)
    for (name, decoding), row in rows.items():
        long.add_row(name, decoding)
        for column, (value, note) in row.items():
            if value:
                long.add_row(f"{column} ({note})" if note else column, decoding, value)
    return long


def cell(estimate: Estimate, signed: bool = False) -> str:
    """`value [low, high]`; a dash in place of an interval that is undefined, as of too few examples."""
    if not math.isfinite(estimate.value):
        return "undefined"
    style = "+.3f" if signed else ".3f"
    interval = "–" if not math.isfinite(estimate.low) else f"{estimate.low:{style}}, {estimate.high:{style}}"
    return f"{estimate.value:{style}} [{interval}]"


def _answered(evaluation: Evaluation) -> int:
    """How many examples the metrics are of."""
    return evaluation.counts["examples"] - evaluation.counts["unanswered"]


def _percent(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _share(part: int, whole: int) -> str:
    """`4 (6.7%)`."""
    return f"{part} ({_percent(part, whole)})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *map(line, rows), ""]

"""Learning curves as PNG files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from real_megatron.evaluation.result import Evaluation

Row = Mapping[str, float]


@dataclass(frozen=True)
class Panel:
    """One plot: what stands on its vertical axis, and how a row of metrics gives it (NaN: it does not)."""

    title: str
    unit: str
    value: Callable[[Row], float]
    log: bool = False
    """Whether the vertical axis is logarithmic."""
    bands: tuple[tuple[str, str], ...] = ()
    """Pairs of metrics between which the area is filled, the wider band first."""


def _field(*names: str) -> Callable[[Row], float]:
    return lambda row: next((row[name] for name in names if name in row), math.nan)


def _anchored(row: Row) -> float:
    # Under the rule `force` every response has an answer; what the model wrote itself is the telling number.
    return 1 - row["rollout/no_anchor"] if "rollout/no_anchor" in row else row.get("valid", math.nan)


PANELS = (
    Panel("Reward", "mean reward", _field("reward")),
    Panel(
        "Rewards of a step's answers: median, 25–75 %, 5–95 %",
        "reward",
        _field("rewards/p50"),
        bands=(("rewards/p05", "rewards/p95"), ("rewards/p25", "rewards/p75")),
    ),
    Panel("Squared error of the expected score", "(ŷ − y*)²", _field("squared_error")),
    Panel("Entropy of the score distribution", "nats", _field("score_entropy")),
    Panel("Responses that reach the score anchor", "share", _anchored),
    Panel("Responses cut off by their length", "share", _field("rollout/truncated")),
    Panel("Response length", "tokens", _field("rollout/response_tokens", "response_tokens")),
    Panel("Variety of the critiques", "distinct-2", _field("cot/distinct_2")),
    Panel("Engine and policy: difference of log-probs", "mean |Δ log p|", _field("mismatch/mean"), log=True),
    Panel("Loss", "loss", _field("loss")),
    Panel("Gradient norm", "norm", _field("grad_norm"), log=True),
)
COLUMNS = 2


def learning_curves(path: Path, runs: Mapping[str, Sequence[Row]]) -> bool:
    """Plot the training metrics (run → rows of metrics.jsonl) over steps, one panel a metric, one colour a run.

    Thin: each step; thick: moving average over a tenth of the steps; areas, each step: percentiles. Panels without data
    are left out; False, and no file, when all are.
    """
    series = [
        (panel, points)
        for panel in PANELS
        if (points := {name: xy for name, rows in runs.items() if len((xy := _points(panel, rows))[0])})
    ]
    if not series:
        return False
    figure, axes = _figure(len(series))
    colours = {name: f"C{i}" for i, name in enumerate(runs)}
    for ax, (panel, points) in zip(axes, series, strict=True):
        for name, (steps, values) in points.items():
            smooth = _moving_average(values, max(1, len(values) // 10))
            ax.plot(steps, values, color=colours[name], alpha=0.3, linewidth=0.8)
            ax.plot(steps, smooth, color=colours[name], linewidth=1.8, label=name)
            if len(values) == 1:
                ax.plot(steps, values, "o", color=colours[name])
            rows = [row for row in runs[name] if math.isfinite(panel.value(row))]
            for low, high in panel.bands:
                lower, upper = [row[low] for row in rows], [row[high] for row in rows]
                ax.fill_between(steps, lower, upper, color=colours[name], alpha=0.15, linewidth=0)
        if panel.log:
            ax.set_yscale("log")
        _label(ax, panel.title, panel.unit)
    _save(figure, path)
    return True


def evaluation_curves(path: Path, runs: Mapping[str, Sequence[Evaluation]]) -> bool:
    """Plot Pearson correlation and squared error on the test sets over steps, RAIL, with 95 % intervals.

    One colour a test set. A run that was evaluated once is a level to compare with: a horizontal broken line.
    False, and no file, when no test set was evaluated at two steps of one run.
    """
    curves: dict[tuple[str, str], list[Evaluation]] = {}
    levels: dict[tuple[str, str], list[Evaluation]] = {}
    for run, evaluations in runs.items():
        for name in dict.fromkeys(e.name for e in evaluations):
            own = sorted((e for e in evaluations if e.name == name), key=_step_of)
            (curves if len(own) > 1 else levels)[run, name] = own
    if not curves:
        return False
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for _, name in [*curves, *levels]))}
    markers = _styles(curves, "osv^D")
    dashes = _styles(levels, ("--", ":", "-."))
    figure, axes = _figure(2)
    for ax, metric, title in zip(axes, ("pearson", "mse"), ("Pearson correlation", "Squared error"), strict=True):
        for (run, name), own in curves.items():
            estimates = [e.metrics["rail"][metric] for e in own]
            steps, values = [_step_of(e) for e in own], [e.value for e in estimates]
            ax.plot(steps, values, color=colours[name], marker=markers[run], markersize=4, label=f"{run}: {name}")
            low, high = [e.low for e in estimates], [e.high for e in estimates]
            ax.fill_between(steps, low, high, color=colours[name], alpha=0.15)
        for (run, name), (only,) in levels.items():
            level = only.metrics["rail"][metric].value
            ax.axhline(level, color=colours[name], linestyle=dashes[run], linewidth=1.2, label=f"{run}: {name}")
        _label(ax, f"{title} on the test sets (RAIL, 95 % interval)", title)
        if (legend := ax.get_legend()) is not None:
            legend.remove()  # one for both, below: it would lie upon the levels
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)
    return True


def _step_of(evaluation: Evaluation) -> int:
    assert evaluation.step is not None, "curves are drawn of evaluations within training"
    return evaluation.step


def _styles(lines: Mapping[tuple[str, str], object], styles: Sequence[str]) -> dict[str, str]:
    """A style for each run among the lines (run, test set); they repeat when there are many runs."""
    return {run: styles[i % len(styles)] for i, run in enumerate(dict.fromkeys(run for run, _ in lines))}


def _points(panel: Panel, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], value) for row in rows if math.isfinite(value := panel.value(row))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps), np.asarray(values, dtype=float)


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and the `width - 1` before it; of fewer at the start."""
    total = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # Figure and canvas without pyplot: no global state, no window system.
    columns = min(COLUMNS, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.remove()
    return figure, axes[:panels]


def _label(ax: Axes, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("step")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if ax.get_yscale() == "linear":
        ax.ticklabel_format(axis="y", useOffset=False)
    if unit == "share":
        ax.set_ylim(0, 1.03)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)

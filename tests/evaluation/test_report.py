"""The report from files of runs: tables hold the evaluations' numbers, curves are drawn, faults are named."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from real_megatron.errors import ConfigError, DataError
from real_megatron.evaluation import plots
from real_megatron.evaluation.calibration import calibration
from real_megatron.evaluation.metrics import agreement
from real_megatron.evaluation.report import (
    cell,
    console_table,
    evaluation_path,
    how_answered,
    read_metrics,
    read_run,
    run_names,
    write_report,
)
from real_megatron.evaluation.result import Evaluation, Prediction

SCALE = [1.0, 2.0, 3.0, 4.0, 5.0]


def make(name: str, noise: float, step: int | None = None, n: int = 60) -> Evaluation:
    """An evaluation whose predictions are labels plus noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, 6, n).astype(float)
    rail = labels + noise * rng.normal(size=n)
    predictions = [
        Prediction(f"{i}", label, r, round(r), [0.2] * 5, ["fine"])
        for i, (label, r) in enumerate(zip(labels.tolist(), rail.tolist(), strict=True))
    ]
    metrics = {d: agreement([getattr(p, d) for p in predictions], labels, SCALE, 100) for d in ("rail", "sampled")}
    counts = dict(examples=n, unanswered=0, responses=n, no_anchor=4, truncated=3, forced=4)
    means = {"response_tokens": 12.0, "score_mass": 0.99, "score_entropy": 0.3}
    config = dict(samples=1, temperature=1.0, top_p=1.0, seed=0, bootstrap=100, no_anchor_rule="force")
    config |= {"probabilities": "full", "scale": {"values": SCALE}, "model": f"runs/{noise}/hf"}
    return Evaluation(name, metrics, counts, means, config, step, predictions)


@pytest.fixture
def runs(tmp_path):
    """Two runs as training leaves them: metrics.jsonl and evaluations."""
    for run, noise in (("sft", 2.0), ("real", 0.5)):
        directory = tmp_path / run
        directory.mkdir()
        rows = [{"step": s, "loss": 1 / s, "grad_norm": None if s == 3 else 1.0} for s in range(1, 21)]
        if run == "real":
            for row in rows:
                step = row["step"]
                row |= {"reward": -1 / step, "squared_error": 1 / step, "score_entropy": 0.5, "valid": 1.0}
                row |= {f"rewards/p{q:02d}": (q - 50) / step for q in (5, 25, 50, 75, 95)}
                row |= {"rollout/truncated": 0.04, "mismatch/mean": 1e-3}
                row |= {"rollout/no_anchor": 0.1, "rollout/response_tokens": 10.0 + step, "cot/distinct_2": 0.5}
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in ("in_domain", "ood"):
            for step, extra in ((0, 2.0), (20, 0.0)):
                make(name, noise + extra, step).save(evaluation_path(directory, name, step))
    return tmp_path


def test_the_table_compares_the_newest_evaluations(runs, tmp_path) -> None:
    results = [read_run("SFT", runs / "sft"), read_run("REAL", runs / "real")]
    path = write_report(tmp_path / "report", results, command=["real-megatron", "report", "a b"], title="T")
    text = path.read_text()
    assert text.startswith("# T\n") and "    real-megatron report 'a b'\n" in text
    for name in ("in_domain", "ood"):
        section = text.split(f"## {name}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line]
        assert "|  | 1 | 2 | 3 | 4 | 5 |" in rows and [row for row in rows if row.startswith("| labels | ")]
        (found,) = [row for row in rows if row.startswith("| SFT | ") and row.count("|") == 6]
        expected = calibration(results[0].evaluations[-1].predictions, SCALE)
        assert (
            found
            == f"| SFT | {expected.bias:+.3f} | {expected.spread:.3f} | {expected.error:.3f} | {expected.crps:.3f} |"
        )
        for run, noise in (("SFT", 2.0), ("REAL", 0.5)):
            for decoding, title in (("rail", "RAIL"), ("sampled", "sampled score")):
                (row,) = [line for line in rows if line.startswith(f"| {run} | {title} |")]
                n, *cells = [text.strip() for text in row.strip("|").split("|")][2:]
                assert n == "60"
                for shown, e in zip(cells, make(name, noise).metrics[decoding].values(), strict=True):
                    assert shown == f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
        (gain,) = [line for line in rows if line.startswith("| REAL − SFT (60) | RAIL |")]
        expected = make(name, 0.5).metrics["rail"]["pearson"].value - make(name, 2.0).metrics["rail"]["pearson"].value
        assert gain.split("|")[3].strip().startswith(f"{expected:+.3f} [+")
        assert "| REAL | 20 | 60 | 4 (6.7%) | 3 (5.0%) | 4 (6.7%) | 0 (0.0%) | 12.0 | 0.990 |" in rows
        assert "- REAL: model `runs/0.5/hf`, 1 critique an example at temperature 1" in section
    for image in ("curves.png", "evaluation.png"):
        pixels = imread(tmp_path / "report" / image)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600 and pixels[..., :3].std() > 0.05
        assert f"]({image})" in text


def test_panels_show_what_the_runs_recorded(runs, tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    metrics = {name: read_run(name, runs / name).metrics for name in ("sft", "real")}
    assert plots.learning_curves(tmp_path / "x.png", metrics)
    axes = {ax.get_title(): ax for ax in figures[0].axes}
    assert len(axes) == len(plots.PANELS)
    for ax in axes.values():
        assert ax.get_xlabel() == "step" and ax.get_ylabel() and ax.get_legend() is not None
    raw, smooth = axes["Reward"].get_lines()
    assert raw.get_ydata().tolist() == [-1 / s for s in range(1, 21)]
    assert smooth.get_ydata()[-1] == pytest.approx((-1 / 19 - 1 / 20) / 2) and smooth.get_label() == "real"
    assert axes["Responses that reach the score anchor"].get_lines()[0].get_ydata().tolist() == [0.9] * 20
    assert axes["Responses cut off by their length"].get_lines()[0].get_ydata().tolist() == [0.04] * 20
    mismatch = axes["Engine and policy: difference of log-probs"]
    assert mismatch.get_lines()[0].get_ydata().tolist() == [1e-3] * 20 and mismatch.get_yscale() == "log"
    rewards = next(ax for title, ax in axes.items() if title.startswith("Rewards of a step"))
    for area, half in zip(rewards.collections, (45, 25), strict=True):
        edges = area.get_paths()[0].vertices
        assert (edges[:, 1].min(), edges[:, 1].max()) == (-half, half) and edges[:, 0].max() == 20
    assert [line.get_label() for line in axes["Loss"].get_lines()[1::2]] == ["sft", "real"]
    assert len(axes["Gradient norm"].get_lines()[0].get_xdata()) == 19  # step 3 has none
    assert axes["Gradient norm"].get_yscale() == "log" and axes["Loss"].get_yscale() == "linear"


def test_a_run_evaluated_once_is_a_level_to_compare_the_curves_with(tmp_path, monkeypatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    level = {"direct": [make(name, 3.0, 40) for name in ("in_domain", "ood")]}
    assert not plots.evaluation_curves(tmp_path / "x.png", level)
    curves = {"real": [make(name, noise, step) for name in ("in_domain", "ood") for step, noise in ((20, 0.5), (0, 2))]}
    assert plots.evaluation_curves(tmp_path / "x.png", level | curves)
    for ax, metric in zip(figures[0].axes, ("pearson", "mse"), strict=True):
        lines = {line.get_label(): line for line in ax.get_lines()}
        assert list(lines) == ["real: in_domain", "real: ood", "direct: in_domain", "direct: ood"]
        expected = [e.metrics["rail"][metric].value for e in (curves["real"][1], curves["real"][0])]
        assert lines["real: in_domain"].get_xdata().tolist() == [0, 20]
        assert lines["real: in_domain"].get_ydata().tolist() == expected
        assert set(lines["direct: ood"].get_ydata()) == {level["direct"][1].metrics["rail"][metric].value}
        colour = {label: line.get_color() for label, line in lines.items()}
        assert colour["direct: ood"] == colour["real: ood"] != colour["real: in_domain"]
        assert lines["direct: ood"].get_linestyle() == "--" and lines["real: ood"].get_linestyle() == "-"


def test_undefined_numbers_are_said_to_be(tmp_path) -> None:
    constant = make("set", 0.0)
    constant.metrics["rail"] = agreement([2.0, 2.0], [1.0, 3.0], SCALE, 10)
    constant.save(evaluation_path(tmp_path / "run", "set"))
    text = write_report(tmp_path / "report", [read_run("A", tmp_path / "run")]).read_text()
    assert "| A | RAIL | 60 | undefined | undefined | undefined | 1.000 [–] |" in text
    assert "- A, RAIL, Pearson, Spearman, Kendall: all predictions are equal." in text
    assert "- A, RAIL, MSE, MAE, accuracy: 2 examples: too few for an interval." in text
    assert not (tmp_path / "report" / "curves.png").exists() and "png" not in text


def test_rows_count_the_examples_that_they_are_of(tmp_path) -> None:
    """Two of four examples have a score: a correlation of 1 without an interval."""
    few = make("set", 0.0, n=4)
    for i in (1, 2):
        few.predictions[i] = replace(few.predictions[i], rail=None, sampled=None, probabilities=None)
    few.counts |= {"unanswered": 2, "responses": 4, "no_anchor": 2, "truncated": 2, "forced": 0}
    few.metrics = {d: agreement([1.0, 2.0], [1.0, 3.0], SCALE, 10) for d in ("rail", "sampled")}
    few.config["max_new_tokens"] = 64
    few.save(evaluation_path(tmp_path / "run", "set"))
    text = write_report(tmp_path / "report", [read_run("A", tmp_path / "run")]).read_text()
    assert "| A | RAIL | 2 | 1.000 [–] | 1.000 [–] |" in text
    assert "| A | – | 4 | 2 (50.0%) | 2 (50.0%) | 0 (0.0%) | 2 (50.0%) |" in text
    table = console_table({"set": few}, 500)
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["examples"] == ["2", "2"] and columns["cut"] == columns["no score"] == ["50.0%"] * 2
    assert columns["forced"] == ["0.0%"] * 2 and columns["pearson"][0].startswith("1.000 [–] (2 examples: too few")
    assert how_answered(few) == (
        "2 of 4 critiques (50.0%) did not come to the anchor: 2 were cut at 64 tokens (data.max_response_tokens), "
        "0 got the anchor appended, and with it a score all the same; 2 of 4 examples (50.0%) have no score"
    )


def test_differences_are_between_the_same_examples_only(tmp_path) -> None:
    first, second, other = make("set", 1.0), make("set", 0.5), make("set", 0.2)
    second.predictions = second.predictions[:30]
    other.predictions = [Prediction(f"x{p.id}", *list(vars(p).values())[1:]) for p in other.predictions]
    for run, e in (("a", first), ("b", second), ("c", other)):
        e.save(evaluation_path(tmp_path / run, "set"))
    text = write_report(tmp_path / "report", [read_run(run, tmp_path / run) for run in "abc"]).read_text()
    assert "| b − a (30) | RAIL |" in text and "| c − a" not in text


def test_metrics_of_a_crashed_run_are_read(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n{"step": 2, "lo')
    (row,) = read_metrics(path)
    assert row["step"] == 1 and math.isnan(row["loss"])
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2: not a row of metrics"):
        read_metrics(path)


def test_what_cannot_be_reported_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        read_run("x", tmp_path / "absent")
    with pytest.raises(ConfigError, match="neither metrics.jsonl nor"):
        read_run("x", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    run = read_run("x", tmp_path)
    for results in ([], [run, run]):
        with pytest.raises(ConfigError, match="different names"):
            write_report(tmp_path / "report", results)


def test_runs_are_named_by_what_tells_them_apart(tmp_path, monkeypatch) -> None:
    assert run_names([tmp_path / "sft", tmp_path / "real"]) == ["sft", "real"]
    assert run_names([tmp_path / "a/real", tmp_path / "b/real", tmp_path / "c"]) == [
        "a/real",
        "b/real",
        f"{tmp_path.name}/c",
    ]
    monkeypatch.chdir(tmp_path)
    assert run_names([tmp_path / "."]) == [tmp_path.name]
    with pytest.raises(ConfigError, match="not one with itself"):
        run_names([tmp_path / "a", tmp_path / "b/../a"])


@pytest.mark.parametrize("width", [60, 80, 180])
def test_a_table_keeps_its_numbers_and_names_the_model_on_a_narrow_terminal(width) -> None:
    results = {name: make(name, 1.0) for name in ("in_domain", "ood")}
    results["ood"].metrics["rail"] = agreement([2.0, 2.0], [1.0, 3.0], SCALE, 10)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(console_table(results, console.width))
    text = console.export_text()
    assert "runs/1.0/hf" in text and "…" not in text and max(map(len, text.splitlines())) <= width
    for result in results.values():
        for metrics in result.metrics.values():
            assert all(cell(estimate) in text for estimate in metrics.values())
    assert "all predictions are equal" in " ".join(text.replace("│", " ").split()) or width == 60

"""REAL on the tiny judge: the GPU's learning curve beside the CPU's, a run that is stopped and resumed, memory.

    python -m benchmarks.training [--steps 100] [--output FILE]

SFT on the CPU gives one checkpoint. From it REAL runs at the same time on the CPU in float32 and on the GPU in float32
and bfloat16, with the same prompts and sampling seeds; a fourth run is stopped by SIGTERM half-way and started again.
Each is a process of its own. Without a GPU all of them run on the CPU: it shows that the benchmark works.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.measure import MIB, peak_bytes, reset_peak
from benchmarks.report import Bar
from real_megatron.config import RunConfig
from real_megatron.data.tiny_judge import write_task
from real_megatron.training import rl, sft
from real_megatron.training.step_log import StepLog
from real_megatron.training.stop import Terminated

EXAMPLES = Path(__file__).parents[1] / "examples" / "tiny_judge"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEASURED = ("seconds/", "memory/", "tokens_per_second", "mfu")
"""Metrics that no two runs have in common."""


@dataclass(frozen=True)
class Run:
    """One REAL run: where, how it is named in the tables, and the step after which it is stopped once."""

    title: str
    name: str
    device: str
    dtype: str
    stop_after: int = 0


def runs(args: argparse.Namespace) -> list[Run]:
    here = "GPU" if DEVICE == "cuda" else "CPU"
    return [
        Run("CPU, float32", "cpu_float32", "cpu", "float32"),
        Run(f"{here}, float32", "float32", DEVICE, "float32"),
        Run(f"{here}, bfloat16", "bfloat16", DEVICE, "bfloat16"),
        Run(f"{here}, float32, stopped and resumed", "resumed", DEVICE, "float32", args.steps // 2),
    ]


def work(args: argparse.Namespace) -> None:
    """A run's process: trains with `--config` and `--set`, and adds what memory each step has needed."""
    config = RunConfig.from_yaml(args.config, args.set)
    write = StepLog.step

    def step(log: StepLog, done: int, values: dict[str, float], seconds: dict[str, float]) -> None:
        memory = {"memory/peak_mib": peak_bytes(DEVICE) / MIB, "memory/used_mib": reset_peak(DEVICE) / MIB}
        write(log, done, values | memory, seconds)
        if done == args.stop_after:
            os.kill(os.getpid(), signal.SIGTERM)  # the run ends after its next step

    StepLog.step = step
    with suppress(Terminated):
        (rl if config.is_rl else sft).train(config)
    dist.destroy_process_group()


def start(config: Path, settings: list[str], device: str, log: Path, stop_after: int = 0) -> subprocess.Popen:
    """Start a run's process."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--config", str(config)]
    command += ["--stop-after", str(stop_after), "--set", *settings]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with log.open("a", encoding="utf-8") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run; RuntimeError with the end of its log where it failed."""
    if process.wait():
        raise RuntimeError(f"{log.name}: exit status {process.returncode}\n{log.read_text(encoding='utf-8')[-4000:]}")


def train(work_dir: Path, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """All runs; the rows of metrics.jsonl of each."""
    write_task(work_dir / "task", sft=args.train_rows, rl=args.train_rows, test=args.test_rows)
    task, data = work_dir / "task", []
    for name in ("in_domain", "ood"):
        key = "in_domain" if name == "in_domain" else "out_of_domain"
        data.append(f"data.eval.{key}.path={task}/test_{name}.jsonl")
    data += ["metrics.tensorboard=false", f"batch.prompts={args.prompts}"]
    model = task / "model"
    if args.sft_steps:
        settings = [*data, f"output={work_dir}/sft", f"steps={args.sft_steps}", f"model.path={model}"]
        settings += [f"data.train.0.path={task}/train_sft.jsonl", f"optimizer.warmup_steps={args.sft_steps // 10}"]
        log = work_dir / "sft.log"
        finish(start(EXAMPLES / "sft.yaml", settings, "cpu", log), log)
        model = work_dir / "sft" / "hf"
    started = []
    data += [f"model.path={model}", f"data.train.0.path={task}/train_rl.jsonl", f"steps={args.steps}"]
    data += [f"evaluation.every={args.every}", "evaluation.bootstrap=10", "checkpoint.save_hf=false"]
    data += [f"optimizer.warmup_steps={min(5, args.steps - 1)}", "objective.no_anchor=force"]
    for run in runs(args):
        settings = [*data, f"output={work_dir / run.name}", f"model.dtype={run.dtype}"]
        log = work_dir / f"{run.name}.log"
        started.append((run, settings, start(EXAMPLES / "real.yaml", settings, run.device, log, run.stop_after)))
    for run, settings, process in started:
        finish(process, work_dir / f"{run.name}.log")
        if run.stop_after:
            log = work_dir / f"{run.name}.log"
            assert rows_of(work_dir / run.name)[-1]["step"] < args.steps, "the run was not stopped"
            finish(start(EXAMPLES / "real.yaml", settings, run.device, log), log)
    return {run.name: rows_of(work_dir / run.name) for run in runs(args)}


def rows_of(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def curves(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> list[str]:
    """Reward and correlation of the runs side by side."""
    table = []
    chosen = runs(args)[:3]
    for step in range(0, args.steps + 1, args.every):
        cells: list[object] = [step]
        for run in chosen:
            near = [
                row["reward"] for row in rows[run.name] if step - args.every < row["step"] <= step and "reward" in row
            ]
            cells.append(f"{statistics.mean(near):.4f}" if near else "–")
        for name in ("in_domain", "out_of_domain"):
            for run in chosen:
                found = [row.get(f"eval/{name}/rail/pearson") for row in rows[run.name] if row["step"] == step]
                cells.append(f"{found[0]:.3f}" if found and found[0] is not None else "–")
        table.append(cells)
    titles = [run.title for run in chosen]
    header = [
        "step",
        *(f"{what}: {t}" for what in ("reward", "Pearson in domain", "Pearson out of domain") for t in titles),
    ]
    return [f"Rewards are means over the {args.every} steps before.", "", *report.table(header, table)]


def resumed(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> tuple[list[str], Bar]:
    """The run that was stopped, row by row beside the one that was not."""
    largest, first = 0.0, None
    assert [row["step"] for row in rows["float32"]] == [row["step"] for row in rows["resumed"]]
    for whole, continued in zip(rows["float32"], rows["resumed"], strict=True):
        for name, value in whole.items():
            other = continued.get(name)
            if name.startswith(MEASURED) or value == other:
                continue
            first = first or f"step {whole['step']}, {name}"
            numbers = value is not None and other is not None
            gap = abs(value - other) / max(abs(value), abs(other)) if numbers else float("inf")
            largest = max(largest, gap)
    said = "bit-equal in every metric" if first is None else f"they differ first at {first}"
    text = f"Stopped after step {args.steps // 2 + 1} of {args.steps} and resumed, beside the run that was not: {said}."
    return [text], Bar("largest relative difference of a metric, resumed and not", largest, 1e-6, False)


def memory(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> tuple[list[str], list[Bar]]:
    """Memory in use after early and last steps, and the peak of the steps."""
    table, bars = [], []
    for run in runs(args)[:3]:
        used = [row["memory/used_mib"] for row in rows[run.name] if "memory/used_mib" in row]
        peaks = [row["memory/peak_mib"] for row in rows[run.name] if "memory/peak_mib" in row]
        seconds = [
            row["seconds/step"] - row.get("seconds/evaluate", 0) for row in rows[run.name] if "seconds/step" in row
        ]
        early = min(10, len(used)) - 1
        table.append(
            [
                run.title,
                f"{used[early]:.1f}",
                f"{used[-1]:.1f}",
                f"{max(peaks[: early + 1]):.1f}",
                f"{max(peaks[early:]):.1f}",
            ]
        )
        table[-1] += [f"{statistics.median(seconds):.2f}"]
        if run.device == "cuda":
            bars.append(
                Bar(
                    f"memory after the last step over that after step {early + 1}, {run.dtype}",
                    used[-1] / used[early],
                    1.02,
                    False,
                )
            )
    header = [
        "run",
        f"MiB in use after step {early + 1}",
        "after the last",
        f"peak up to step {early + 1}",
        "peak after it",
        "median s a step",
    ]
    return report.table(header, table), bars


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of REAL")
    parser.add_argument("--sft-steps", type=int, default=200, help="of SFT before; 0: REAL begins with random weights")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step")
    parser.add_argument("--every", type=int, default=10, help="steps between the rows of the table")
    parser.add_argument("--train-rows", type=int, default=6000, help="of each training set")
    parser.add_argument("--test-rows", type=int, default=200, help="of each test set")
    parser.add_argument("--output", type=Path, help="write the result here as well")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop-after", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--set", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.config:
        work(args)
        return
    preamble = report.preamble(
        "Training on a GPU beside a CPU",
        report.hardware(DEVICE),
        report.software("megatron-core", "transformers"),
        report.command("training", {"--output": "FILE"}),
    )
    with tempfile.TemporaryDirectory() as scratch:
        rows = train(Path(scratch), args)
    said, bar = resumed(rows, args)
    flat, bars = memory(rows, args)
    summary = ["", "What it has to show:", "", *(b.line() for b in (bar, *bars))]
    report.publish([*preamble, *summary, "", *curves(rows, args), "", *said, "", *flat], args.output)


if __name__ == "__main__":
    main()

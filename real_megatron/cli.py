"""The command line: `real-megatron train | sft | evaluate | judge | convert | report`.

Commands import what they need when they run, so that `--help` answers at once.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from real_megatron.sections import ConfigError

EXIT_ERROR = 1
EXIT_TERMINATED = 143  # what a shell reports for SIGTERM

# Errors whose message says what to mend: shown without a traceback, unless --traceback asks for it.
MENDABLE = (ConfigError, ValueError, OSError, FloatingPointError)
# Tables in a file or pipe are not squeezed into 80 columns.
CONSOLE_OUT = Console(width=None if sys.stdout.isatty() else 180)
full_traceback = False

app = typer.Typer(
    name="real-megatron",
    help="Post-train a large language model to be a judge, with regression-aware reinforcement learning (REAL) on "
    "Megatron-Core.\n\n"
    "A judge reads a prompt, writes a critique, then a score. The usual order of work:\n\n"
    "  real-megatron sft sft.yaml            warm up on given critiques (RAFT)\n\n"
    "  real-megatron train real.yaml         REAL: sample critiques, learn from the score's error\n\n"
    "  real-megatron evaluate real.yaml      correlation with the labels, with confidence intervals\n\n"
    "  real-megatron report runs/real        learning curves and tables\n\n"
    "  real-megatron judge --model DIR …     score your own file with the result\n\n"
    "docs/configuration.md lists every key of the YAML files.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file (docs/configuration.md).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides, for example optimizer.lr=1e-6 data.train.0.limit=100.",
        show_default=False,
    ),
]


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of an error.")] = False,
) -> None:
    global full_traceback
    full_traceback = traceback


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train by reinforcement learning: REAL, or a baseline (rloo, grpo, jepo).

    Each step samples rollout.n responses to batch.prompts prompts, scores them from the policy's own score
    distribution, and updates the policy. Metrics, checkpoints and the final Hugging Face checkpoint (hf/) go to the
    output directory. Run it again to resume from the newest checkpoint; SIGTERM saves and ends.

    Examples:

      real-megatron train real.yaml

      real-megatron train real.yaml optimizer.lr=5e-7 output=runs/lower-lr

      torchrun --nproc-per-node 8 -m real_megatron train real.yaml parallel.tensor=4
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.training.rl import train as run

        run(RunConfig.from_yaml(config, overrides or []))


@app.command()
def sft(config: ConfigFile, overrides: Overrides = None) -> None:
    """Fine-tune on given critiques: plain SFT, RAFT or TRACT (objective.name).

    raft and tract add the squared error of the expected score to the next-token loss. For TRACT's second stage set
    sft.cots=generated and sft.cot_model to the first stage's hf/ directory.

    Examples:

      real-megatron sft sft.yaml

      real-megatron sft sft.yaml epochs=3 objective.name=raft

      torchrun --nproc-per-node 2 -m real_megatron sft sft.yaml parallel.pipeline=2
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.training.sft import train as run

        run(RunConfig.from_yaml(config, overrides or []))


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face checkpoint to evaluate; default: the run's own, output/hf.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for evaluation/NAME.json; default: the run's output directory.")
    ] = None,
) -> None:
    """Evaluate a checkpoint on the configuration's test sets (data.eval).

    Samples evaluation.samples critiques per example, reads RAIL (expected score) and sampled scores, and prints
    Pearson, Spearman and Kendall correlation and squared error with 95 % bootstrap intervals.

    Examples:

      real-megatron evaluate real.yaml

      real-megatron evaluate real.yaml --model Qwen3-8B --output runs/before evaluation.samples=4

      torchrun --nproc-per-node 8 -m real_megatron evaluate real.yaml
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.training.commands import evaluate_checkpoint

        run = RunConfig.from_yaml(config, overrides or [])
        table = evaluate_checkpoint(run, model or run.output / "hf", output or run.output)
        if os.environ.get("RANK", "0") == "0":
            CONSOLE_OUT.print(table)


@app.command()
def judge(
    model: Annotated[Path, typer.Option(help="Directory of a Hugging Face checkpoint.")],
    source: Annotated[
        Path, typer.Option("--input", help="JSONL file: `prompt` or `messages` (or the template's fields) a row.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write: score, distribution and critique a row.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with scale, template and sampling; default: the one that training left with the model."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Score every row of a JSONL file: critique, expected score and score distribution.

    Run it again to go on where it stopped. A bad row does not stop the job: it is reported, with its line, in
    OUTPUT.errors.jsonl, and tried again by the next run.

    Examples:

      real-megatron judge --model runs/real/hf --input answers.jsonl --output scores.jsonl

      real-megatron judge --model Qwen3-8B --input a.jsonl --output s.jsonl data.template=prometheus
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.training.commands import judge_file
        from real_megatron.training.export import RUN_FILE

        if config is None and (model / RUN_FILE).exists():
            config = model / RUN_FILE
        done = judge_file(RunConfig.from_yaml(config, overrides or []), model, source, output)
        typer.echo(
            f"{output}: {done.judged} rows judged, {done.skipped} done before, {done.bad} bad, "
            f"{done.no_anchor} critiques without an anchor"
        )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of runs, the one to compare with first.")],
    output: Annotated[Path | None, typer.Option(help="Directory of report.md; default: the last run's.")] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Evaluation report",
) -> None:
    """Write report.md: tables of agreement with the labels, differences between runs, learning curves (PNG).

    Examples:

      real-megatron report runs/real

      real-megatron report runs/sft runs/real --output runs/comparison
    """
    with reported():
        from real_megatron.evaluation.report import read_stage, stage_names, write_report

        stages = [read_stage(name, run) for name, run in zip(stage_names(runs), runs, strict=True)]
        typer.echo(write_report(output or runs[-1], stages, command=["real-megatron", *sys.argv[1:]], title=title))


convert = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron-Core (torch_dist), bit for bit, streaming.\n\n"
    "Training needs no conversion: it reads Hugging Face checkpoints and writes one at its end.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Parallel processes; default: by the machine's cores.")]


@convert.command("to-megatron")
def to_megatron(
    source: Annotated[Path, typer.Argument(help="Directory of the Hugging Face checkpoint.")],
    output: Annotated[Path | None, typer.Argument(help="Directory to write; must not exist yet.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size that the files are cut for.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel size.")] = 1,
    dtype: Dtype = None,
    workers: Workers = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the parameter mapping and sizes, write nothing.")
    ] = False,
) -> None:
    """Hugging Face → Megatron. The result loads at every layout; tp, pp and ep only decide how it is cut into files.

    Examples:

      real-megatron convert to-megatron Qwen3-8B qwen3-8b-megatron --tp 4 --pp 2

      real-megatron convert to-megatron Qwen3-8B --tp 4 --dry-run
    """
    with reported():
        from real_megatron import bridge

        layout = {"tp": tp, "pp": pp, "ep": ep, "dtype": torch_dtype(dtype)}
        if dry_run:
            CONSOLE_OUT.print(bridge.dry_run(source, **layout))
            return
        if output is None:
            raise ConfigError("convert to-megatron: name the OUTPUT directory, or add --dry-run")
        done = bridge.convert_hf_to_megatron(source, output, workers=workers, **layout)
        typer.echo(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")


@convert.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(help="Directory of the Megatron checkpoint, of any layout.")],
    output: Annotated[Path, typer.Argument(help="Directory to write; must not exist yet.")],
    hf: Annotated[
        Path | None, typer.Option(help="Where config.json and the tokenizer are; default: SOURCE/hf.")
    ] = None,
    dtype: Dtype = None,
    workers: Workers = None,
) -> None:
    """Megatron → Hugging Face: the model of a converted checkpoint or of a training checkpoint.

    Examples:

      real-megatron convert to-hf qwen3-8b-megatron qwen3-8b-back

      real-megatron convert to-hf runs/real/checkpoints/step-000100 step-100-hf --hf Qwen3-8B
    """
    with reported():
        from real_megatron import bridge

        done = bridge.convert_megatron_to_hf(source, output, hf_path=hf, dtype=torch_dtype(dtype), workers=workers)
        typer.echo(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")


def torch_dtype(name: str | None) -> Any:
    """The torch dtype of a --dtype option."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if name is not None and name not in known:
        raise ConfigError(f"--dtype {name}: use one of {', '.join(known)}")
    return None if name is None else getattr(torch, name)


def main() -> None:
    """Entry point of the console command."""
    app()


@contextmanager
def reported() -> Iterator[None]:
    """Log to the terminal, and turn errors that a user can mend into one message and an exit status."""
    from real_megatron.rollout.remote.errors import RolloutError
    from real_megatron.training.terminal import CONSOLE, set_up_logging

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    set_up_logging(rank)
    from real_megatron.training.stop import Terminated

    try:
        yield
    except Terminated as stop:
        logging.getLogger(__name__).warning("%s", stop)
        sys.exit(EXIT_TERMINATED)
    except (*MENDABLE, RolloutError) as error:
        if full_traceback:
            raise
        if rank == 0 or not isinstance(error, ConfigError):  # a wrong configuration is found by every rank alike
            CONSOLE.print(
                f"error{f' on rank {rank}' if world > 1 else ''}: {error}",
                style="bold red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()

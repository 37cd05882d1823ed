"""The command line: `real-megatron train | sft | evaluate | judge | convert | report`.

Commands import what they need when they run, so that `--help` answers at once.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from real_megatron.sections import ConfigError

EXIT_USAGE = 2
EXIT_TERMINATED = 143  # what a shell reports for SIGTERM: schedulers requeue on it

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
        metavar="[KEY=VALUE]...",
        help="Overrides, for example optimizer.lr=1e-6 data.train.0.limit=100.",
        show_default=False,
    ),
]


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


def main() -> None:
    """Entry point of the console command."""
    app()


@contextmanager
def reported() -> Iterator[None]:
    """Log to the terminal, and turn errors that a user can mend into one message and an exit status."""
    rank = int(os.environ.get("RANK", "0"))
    handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", handlers=[handler])
    from real_megatron.training.stop import Terminated

    try:
        yield
    except Terminated as stop:
        logging.getLogger(__name__).warning("%s", stop)
        sys.exit(EXIT_TERMINATED)
    except (ConfigError, ValueError, FileNotFoundError, FloatingPointError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="bold red", markup=False, highlight=False)
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()

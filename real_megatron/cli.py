"""The command line: `real-megatron train | sft | critiques | evaluate | judge | report | plan | doctor | convert`.

Commands import what they need when they run, so that `--help` answers at once.
"""

import io
import logging
import os
import platform
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from real_megatron.errors import ConfigError, DataError, EngineError, UserError, refuse
from real_megatron.version import VERSION

if TYPE_CHECKING:
    from real_megatron.config import RunConfig

EXIT_ERROR = 1
EXIT_SIGNAL = 128  # and the signal's number, as a shell reports it: 130 for SIGINT (Ctrl-C), 143 for SIGTERM

# Errors whose message says all: shown without a traceback, unless --traceback asks for it. OSError: a full disk, a
# missing file. FloatingPointError: a loss that is not finite. Every other error is a bug.
EXPLAINED = (UserError, EngineError, OSError, FloatingPointError)
# Tables in a file or pipe have room.
CONSOLE_OUT = Console(width=None if sys.stdout.isatty() else 180)
show_traceback = False
verbose_log = False

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


MODEL = "Hugging Face checkpoint: a directory, or a name on the hub"
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]


@app.callback()
def options(
    with_traceback: Annotated[bool, typer.Option("--traceback", help="Show the whole traceback of any error.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the log and the warnings of other packages, too.")
    ] = False,
) -> None:
    global show_traceback, verbose_log
    show_traceback, verbose_log = with_traceback, verbose


RunDryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check settings, data, files, servers and memory on one CPU and say what the run would do; no weights are "
        "read, nothing is written (docs/dry_run.md).",
    ),
]
World = Annotated[int | None, typer.Option(min=1, help="With --dry-run: ranks of the run; default: torchrun's, or 1.")]
GpuName = Annotated[str | None, typer.Option("--gpu", help="With --dry-run: A100, H100 (default), H200 or B200.")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: RunDryRun = False,
    world: World = None,
    gpu: GpuName = None,
) -> None:
    """Train by reinforcement learning: REAL, or a baseline (rloo, grpo, jepo).

    Each step samples rollout.n responses to batch.prompts prompts, scores them from the policy's own score
    distribution, and updates the policy. Metrics, checkpoints and the final Hugging Face checkpoint (hf/) go to the
    output directory. Run it again to resume from the newest checkpoint; Ctrl-C (SIGINT) or SIGTERM finishes the step,
    saves and ends, a second Ctrl-C ends at once.

    Examples:

      real-megatron train real.yaml

      real-megatron train real.yaml optimizer.lr=5e-7 output=runs/lower-lr

      torchrun --nproc-per-node 8 -m real_megatron train real.yaml parallel.tensor=4

      real-megatron train real.yaml --dry-run --world 8 parallel.tensor=4
    """
    with reported():
        from real_megatron.config import RunConfig

        chosen = RunConfig.from_yaml(config, overrides or [])
        if only_dry_run("train", chosen, dry_run, world, gpu):
            return
        from real_megatron.training.rl import train as run

        run(chosen)


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: RunDryRun = False,
    world: World = None,
    gpu: GpuName = None,
) -> None:
    """Fine-tune on given critiques: plain SFT, RAFT or TRACT (objective.name).

    raft and tract add the squared error of the expected score to the next-token loss. TRACT's second stage trains on
    the critiques that its first stage writes: see `real-megatron critiques`.

    Examples:

      real-megatron sft sft.yaml

      real-megatron sft sft.yaml epochs=3 objective.name=raft

      torchrun --nproc-per-node 2 -m real_megatron sft sft.yaml parallel.pipeline=2

      real-megatron sft sft.yaml --dry-run --world 8 --gpu H200
    """
    with reported():
        from real_megatron.config import RunConfig

        chosen = RunConfig.from_yaml(config, overrides or [])
        if only_dry_run("sft", chosen, dry_run, world, gpu):
            return
        from real_megatron.training.sft import train as run

        run(chosen)


def only_dry_run(
    command: Literal["train", "sft"], config: "RunConfig", dry_run: bool, world: int | None, gpu: str | None
) -> bool:
    """Whether a dry run was asked for, which is then done and shown: once, also under torchrun."""
    if not dry_run:
        if world or gpu:
            raise ConfigError("--world and --gpu are what a dry run is to assume: add --dry-run, or leave them out")
        return False
    if is_rank_0():
        from real_megatron.hardware import find_gpu
        from real_megatron.runtime import world_size
        from real_megatron.training.dry_run import dry_run as look
        from real_megatron.training.dry_run import table

        found = look(config, command, world or world_size(), find_gpu(gpu or "H100"))
        CONSOLE_OUT.print(table(found))
        for warning in found.warnings:
            CONSOLE_OUT.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return True


@app.command()
def critiques(
    config: ConfigFile,
    model: Annotated[str, typer.Option(help=MODEL + ", which writes the critiques.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write; SFT reads it as it is.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Critiques per prompt.")] = 1,
    revision: Revision = None,
) -> None:
    """Let a checkpoint write critiques for the prompts of data.train: the data of TRACT's second stage.

    Sampled with rollout.temperature and rollout.top_p; critiques that do not come to the score's anchor are dropped and
    counted. Run it again to go on where it stopped. Each row holds its prompt as chat messages, its label and the
    critique.

    Examples:

      real-megatron critiques sft.yaml --model runs/sft/hf --output cots.jsonl

      real-megatron sft sft.yaml objective.name=tract data.train='[{path: cots.jsonl}]' output=runs/stage2
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.judging.critiques import write_critiques
        from real_megatron.terminal import Counter

        refuse_model_path(overrides)
        with Counter("prompts", enabled=is_rank_0()) as shown:
            count = write_critiques(
                RunConfig.from_yaml(config, overrides or []),
                model,
                output,
                samples,
                revision=revision,
                on_progress=lambda done, total: shown("critiques", done, total),
            )
        if is_rank_0():
            typer.echo(f"{output}: {count} critiques")


@app.command()
def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help=MODEL + "; default: the run's own, output/hf.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for evaluation/NAME.json; default: the run's output directory.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Evaluate a checkpoint on the configuration's test sets (data.eval).

    Samples evaluation.samples critiques per example, reads RAIL (expected score) and sampled scores, and prints
    Pearson, Spearman and Kendall correlation and squared error with 95 % bootstrap intervals. Run it again to go on
    where it stopped.

    Examples:

      real-megatron evaluate real.yaml

      real-megatron evaluate real.yaml --model Qwen3-8B --output runs/before evaluation.samples=4

      torchrun --nproc-per-node 8 -m real_megatron evaluate real.yaml
    """
    with reported(lambda: f"what is judged is kept; {GO_ON}"):
        from real_megatron.config import RunConfig
        from real_megatron.evaluation.report import console_table
        from real_megatron.judging.evaluate import evaluate as run
        from real_megatron.terminal import Counter

        refuse_model_path(overrides)
        chosen = RunConfig.from_yaml(config, overrides or [])
        with Counter("examples", enabled=is_rank_0()) as shown:
            results = run(chosen, model, output, revision=revision, on_progress=shown)
        if is_rank_0():
            CONSOLE_OUT.print(console_table(results, CONSOLE_OUT.width))


@app.command()
def judge(
    model: Annotated[str, typer.Option(help=MODEL + ".")],
    source: Annotated[
        Path, typer.Option("--input", help="JSONL file: `prompt` or `messages` (or the template's fields) a row.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write: score, distribution and critique a row.")],
    keep_fields: Annotated[
        str, typer.Option(help="Fields of the input, with commas between, that the output rows get as they are.")
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML of a run; default: scale, template, lengths and sampling as training left them with the model."
        ),
    ] = None,
    revision: Revision = None,
    overrides: Overrides = None,
) -> None:
    """Score every row of a JSONL file: critique, expected score and score distribution. Columns `label` and `cot` are
    not read.

    Run it again to go on where it stopped. A bad row does not stop the job: it is reported, with its line, in
    OUTPUT.errors.jsonl, and tried again by the next run.

    Examples:

      real-megatron judge --model runs/real/hf --input answers.jsonl --output scores.jsonl

      real-megatron judge --model Qwen3-8B --input a.jsonl --output s.jsonl data.template=prometheus

      real-megatron judge --model runs/real/hf --input a.jsonl --output s.jsonl --keep-fields source,label
    """
    with reported(lambda: f"{lines_of(output):,} rows of {source} are judged; {GO_ON}"):
        from real_megatron.config import RunConfig
        from real_megatron.hf.output import check_output_file
        from real_megatron.judging.file import count_rows, errors_path, fields_to_keep, judge_file
        from real_megatron.judging.judge import Judge
        from real_megatron.locks import only_writer
        from real_megatron.runtime import world_size
        from real_megatron.terminal import Counter

        if world_size() > 1:
            raise ConfigError("judge runs as one process: start it without torchrun; servers take several GPUs")
        refuse_model_path(overrides)
        check_output_file(output, "output")
        if output.exists() and output.samefile(source):
            raise ConfigError(f"--output: {output} is the input: name another file")
        rows = count_rows(source)
        kept = fields_to_keep([name for name in map(str.strip, keep_fields.split(",")) if name])
        with only_writer(output):  # judge_file does it: here only to be refused before the model is loaded
            pass
        chosen = None if config is None else RunConfig.from_yaml(config)
        loaded = Judge.from_pretrained(
            model,
            revision=revision,
            config=chosen,
            overrides=overrides or [],
            work_dir=output.parent / "rollout",
            start=False,
        )
        with loaded as asked, Counter("rows") as shown:
            shown("judging", 0, rows)
            done = judge_file(
                asked,
                source,
                output,
                on_progress=lambda done: shown("judging", done.judged + done.skipped + done.bad, rows),
                keep_fields=kept,
            )
        typer.echo(
            f"{output}: {done.judged} rows judged, {done.skipped} done before, {done.bad} bad, "
            f"{done.no_anchor} critiques without an anchor ({done.truncated} of them cut at data.max_response_tokens), "
            f"{done.cut} prompts cut"
        )
        if done.bad and not done.judged + done.skipped:
            raise DataError(
                f"{source}: no row could be judged, see {errors_path(output)}: the input is to be JSONL, with what the "
                "template names in each row"
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
        from real_megatron.evaluation.report import read_run, run_names, write_report
        from real_megatron.hf.output import check_output

        check_output(output or runs[-1], "output")
        results = [read_run(name, run) for name, run in zip(run_names(runs), runs, strict=True)]
        typer.echo(write_report(output or runs[-1], results, command=["real-megatron", *sys.argv[1:]], title=title))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=MODEL + ". config.json alone is needed.")],
    gpus: Annotated[int, typer.Option(min=1, help="All GPUs: those that train and those that serve.")],
    gpu: Annotated[str, typer.Option(help="Kind of GPU: A100, H100, H200 or B200.")] = "H100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    rollout: Annotated[
        str, typer.Option(help="Servers: colocated with the trainer, separate, or auto (the faster); none: sft.")
    ] = "auto",
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a prompt; default: half of data.max_prompt_tokens.")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of a response; default: half of data.max_response_tokens.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layouts to show.")] = 5,
    config: Annotated[
        Path | None, typer.Option(help="YAML of a run, for batch, lengths, responses and objective; default: defaults.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="YAML file to write the best layout's settings to.")] = None,
    revision: Revision = None,
    overrides: Overrides = None,
) -> None:
    """Choose how to spread a model over GPUs: the estimated memory and step time of every layout.

    Tries all sizes of parallelism that divide the model, recomputation, token budgets and placements of the rollout
    servers; shows the fastest that fit, and the settings of the first. Nothing is loaded, and no GPU is needed.

    Examples:

      real-megatron plan --model Qwen/Qwen3-32B --gpus 32

      real-megatron plan --model Qwen3-8B --gpus 8 --gpu A100 --config real.yaml rollout.n=16
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.hardware import find_gpu
        from real_megatron.hf.output import check_output_file
        from real_megatron.planning.command import find_layouts
        from real_megatron.planning.report import candidates_table, settings

        if output is not None:
            check_output_file(output, "--output")
            if output.exists():
                raise ConfigError(f"--output: {output} exists: name another file, or remove it")
        kind = replace(find_gpu(gpu), per_node=gpus_per_node)
        run = RunConfig.from_yaml(config, overrides or [])
        found = find_layouts(run, model, gpus, kind, rollout, prompt_tokens, response_tokens, revision, top)
        CONSOLE_OUT.print(candidates_table(found, kind))
        text = settings(found.best[0], kind, run)
        if output is None:
            typer.echo(f"\nSettings of the first:\n\n{text}", nl=False)
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text, encoding="utf-8")
            typer.echo(f"{output}: settings of the first")


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Option(help="YAML of a run, whose servers and settings are looked at; default: defaults.")
    ] = None,
    overrides: Overrides = None,
    python: Annotated[
        str | None,
        typer.Option(
            help="Python of the environment that has the servers; default: the configuration's rollout.python."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Host file of a launch (docs/launching.md): check its hosts over ssh, instead of this machine."
        ),
    ] = None,
    shared: Annotated[
        Path | None,
        typer.Option(
            help="With --cluster: directory that all hosts share; default: `output` of --config, or this one."
        ),
    ] = None,
    ssh_option: Annotated[
        list[str] | None,
        typer.Option(
            help="With --cluster: options of ssh, such as '-F FILE'; those of the variable SSH_OPTIONS come next."
        ),
    ] = None,
) -> None:
    """Say what is installed, which fast paths a run would take here and why not, and how to install what is missing.

    With --cluster: whether the hosts of a launch can run together: ssh, software, shared files, ports, GPUs, networks,
    clocks, and collectives over all training ranks, timed. Exit status 1 if something that a run needs is broken
    (docs/doctor.md).

    Examples:

      real-megatron doctor

      real-megatron doctor --config real.yaml --json

      real-megatron doctor --python .venv-sglang/bin/python

      real-megatron doctor --cluster hosts --shared /data/runs
    """
    with reported():
        from real_megatron.config import RunConfig
        from real_megatron.doctor.examination import as_json as to_json
        from real_megatron.doctor.examination import examine, is_broken, table

        run = RunConfig.from_yaml(config, overrides or [])
        if cluster is not None:
            from real_megatron.cluster.hostfile import read_hosts
            from real_megatron.cluster.preflight import preflight

            if python is not None:
                raise ConfigError("--python is about this machine's servers: leave it out, or --cluster")
            directory = shared or existing(Path(run.output if config else "."))
            options = [word for option in ssh_option or [] for word in shlex.split(option)]
            found = preflight(read_hosts(cluster), str(directory.absolute()), options)
            title = f"the hosts of {cluster}"
        else:
            if shared is not None or ssh_option:
                raise ConfigError("--shared and --ssh-option are about hosts: add --cluster, or leave them out")
            if python is not None:
                engine = "sglang" if run.rollout.engine == "transformers" else run.rollout.engine
                run = run.with_overrides([f"rollout.python={python}", f"rollout.engine={engine}"])
            found, title = examine(run, run.rollout.python), f"real_megatron {VERSION} on {platform.node()}"
        if as_json:
            typer.echo(to_json(found))
        else:
            CONSOLE_OUT.print(table(found, title))
        if is_broken(found):
            sys.exit(EXIT_ERROR)


convert = typer.Typer(
    help="Convert checkpoints between Hugging Face and Megatron-Core (torch_dist), bit for bit, streaming.\n\n"
    "Training needs no conversion: it reads Hugging Face checkpoints and writes one at its end.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")

Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as stored.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Parallel processes; default: by the machine's cores.")]
Family = Annotated[str, typer.Option(help="Model family: auto, or module:name for one of your own.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Then compare the logits of both sides on random tokens, in float32.")
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the parameter mapping and sizes; needs config.json alone, writes nothing."),
]


@convert.command("to-megatron")
def to_megatron(
    source: Annotated[str, typer.Argument(help=MODEL + ".")],
    output: Annotated[Path | None, typer.Argument(help="Directory to write; must not exist yet.")] = None,
    tensor: Annotated[int, typer.Option(min=1, help="Tensor-parallel size that the files are written for.")] = 1,
    pipeline: Annotated[int, typer.Option(min=1, help="Pipeline-parallel size.")] = 1,
    expert: Annotated[int, typer.Option(min=1, help="Expert-parallel size.")] = 1,
    dtype: Dtype = None,
    vocab_multiple: Annotated[
        int, typer.Option(min=1, help="The vocabulary is padded to a multiple of this times the tensor-parallel size.")
    ] = 64,
    workers: Workers = None,
    family: Family = "auto",
    revision: Revision = None,
    verify: Verify = False,
    dry_run: DryRun = False,
) -> None:
    """Hugging Face → Megatron. The result loads at every layout; the sizes only decide how it is divided into files.

    Examples:

      real-megatron convert to-megatron Qwen/Qwen3-8B qwen3-8b-megatron --tensor 4 --pipeline 2 --verify

      real-megatron convert to-megatron Qwen3-8B --tensor 4 --dry-run
    """
    with reported(lambda: f"nothing was written{f' to {output}' if output else ''}; run the same command again"):
        from real_megatron import bridge
        from real_megatron.hf.directory import checkpoint_directory

        options: dict[str, Any] = {"tensor": tensor, "pipeline": pipeline, "expert": expert, "family": family}
        options |= {"vocab_multiple": vocab_multiple, "dtype": torch_dtype(dtype), "revision": revision}
        if dry_run:
            CONSOLE_OUT.print(bridge.dry_run(source, **options))
            return
        if output is None:
            raise ConfigError("convert to-megatron: name the OUTPUT directory, or add --dry-run")
        done = bridge.convert_hf_to_megatron(source, output, workers=workers, **options)
        typer.echo(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")
        if verify:
            show_verification(checkpoint_directory(source, revision), output, family)


@convert.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(help="Directory of the Megatron checkpoint, of any layout.")],
    output: Annotated[Path | None, typer.Argument(help="Directory to write; must not exist yet.")] = None,
    hf: Annotated[
        str | None, typer.Option(help=MODEL + " with config.json and the tokenizer; default: SOURCE/hf.")
    ] = None,
    dtype: Dtype = None,
    max_file_gb: Annotated[float, typer.Option(help="Largest safetensors file, in GB.")] = 5.0,
    workers: Workers = None,
    family: Family = "auto",
    revision: Revision = None,
    verify: Verify = False,
    dry_run: DryRun = False,
) -> None:
    """Megatron → Hugging Face: the model of a converted checkpoint or of a training checkpoint.

    Examples:

      real-megatron convert to-hf qwen3-8b-megatron qwen3-8b-back

      real-megatron convert to-hf runs/real/checkpoints/step-000100 step-100-hf --hf Qwen/Qwen3-8B
    """
    with reported(lambda: f"nothing was written{f' to {output}' if output else ''}; run the same command again"):
        from real_megatron import bridge

        if dry_run:
            directory = bridge.side_directory(source, hf, revision)
            CONSOLE_OUT.print(bridge.dry_run(directory, dtype=torch_dtype(dtype), family=family))
            return
        if output is None:
            raise ConfigError("convert to-hf: name the OUTPUT directory, or add --dry-run")
        if not 0 < max_file_gb < 1e6:
            raise ConfigError(f"--max-file-gb {max_file_gb:g}: give a positive number of GB, such as 5")
        done = bridge.convert_megatron_to_hf(
            source,
            output,
            hf_path=hf,
            dtype=torch_dtype(dtype),
            max_file_bytes=int(max_file_gb * 10**9),
            workers=workers,
            family=family,
            revision=revision,
        )
        typer.echo(f"{done.output}: {done.parameters:,} parameters in {done.files} files, {done.seconds:.1f} s")
        if verify:
            show_verification(output, source, family)


def show_verification(hf: Path, megatron: Path, family: str) -> None:
    """Compare the logits of both sides on random tokens; raises CheckpointError when they differ."""
    from real_megatron.errors import CheckpointError
    from real_megatron.policy.verify import verify

    result = verify(hf, megatron, family=family)
    typer.echo(
        f"logits of {result.tokens} random tokens: largest difference {result.difference:.2g}, largest logit "
        f"{result.scale:.3g}"
    )
    if not result.passed:
        raise CheckpointError(f"{megatron} does not compute what {hf} computes: their logits differ as shown above")


def refuse_model_path(overrides: list[str] | None) -> None:
    """Raise ConfigError for an override of the model that training starts from, where another one is asked."""
    for override in overrides or []:
        if override.partition("=")[0].strip() in ("model.path", "model.revision"):
            raise ConfigError(
                f"override `{override}`: model.path and model.revision are what training starts from; name the "
                "checkpoint to ask with --model (and --revision)"
            )


def torch_dtype(name: str | None) -> Any:
    """The torch dtype of a --dtype option."""
    import torch

    known = ("float32", "bfloat16", "float16")
    if name is not None and name not in known:
        raise ConfigError(f"--dtype {name}: use one of {', '.join(known)}")
    return None if name is None else getattr(torch, name)


def main() -> None:
    """Entry point of the console command."""
    # A terminal or pipe of another encoding, as in the locale C, shows `?` for what it does not have.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    app()


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM has come where nothing is to be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, so that servers, worker processes and half-written files go with the
    command; the next signal ends it at once. Under torchrun SIGTERM does so too, since it ends ranks that hang."""
    listened = [signal.SIGINT] if "RANK" in os.environ else [signal.SIGINT, signal.SIGTERM]

    def receive(number: int, frame: FrameType | None) -> None:
        for one in listened:
            signal.signal(one, signal.SIG_DFL)
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():  # Python delivers no signals there
        yield
        return
    before = {number: signal.signal(number, receive) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


GO_ON = "run the same command again to go on"


@contextmanager
def reported(go_on: Callable[[], str] = lambda: GO_ON) -> Iterator[None]:
    """Log to the terminal; turn an error that explains itself into one message, and show any other as the bug it is.

    go_on: what to say after a signal that ends the command
    """
    from real_megatron.terminal import set_up_logging

    set_up_logging(number_of("RANK", 0), verbose_log)
    log = logging.getLogger(__name__)
    try:
        with interruptible():
            from real_megatron.announced import check_announced

            try:
                check_announced()
                yield
            except Exception as error:
                if isinstance(error, _loaded("training.stop", "Terminated")):
                    log.warning("%s", error)
                    sys.exit(EXIT_SIGNAL + error.number)
                if show_traceback:
                    raise
                if isinstance(error, (*EXPLAINED, *_loaded("runtime", "OtherRankFailed"))):
                    show_error(error)
                    refuse(error)
                else:
                    show_bug(error)
                sys.exit(EXIT_ERROR)
    except Interrupted as interrupt:
        if is_rank_0():
            log.warning("stopped by %s: %s", signal.Signals(interrupt.number).name, go_on())
        sys.exit(EXIT_SIGNAL + interrupt.number)


def _loaded(module: str, name: str) -> tuple[type[Any], ...]:
    """A class of this package, if its module has been imported; not imported for it, since `doctor` runs where torch
    cannot be."""
    loaded = sys.modules.get(f"real_megatron.{module}")
    return (getattr(loaded, name),) if loaded else ()


def is_rank_0() -> bool:
    """Whether this process is the first, or the only one, of a run."""
    return os.environ.get("RANK", "0") == "0"


def number_of(variable: str, default: int) -> int:
    """A number of the environment; the default, too, where it is none, which `check_announced` refuses."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else default


def lines_of(file: Path) -> int:
    """Complete lines of a file; 0 without one."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def show_error(error: Exception) -> None:
    """The message of an error, with the notes on where it happened; from one rank of a node where all find the same."""
    rank, world = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
    if number_of("LOCAL_RANK", rank) and getattr(error, "on_every_rank", False):
        return
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    _print_red(f"error{f' on rank {rank}' if world > 1 else ''}: {error}{notes}")


def existing(path: Path) -> Path:
    """The path, or the directory in which what is missing of it will be made."""
    path = path.absolute()
    return path if path.exists() or path == path.parent else existing(path.parent)


def show_bug(error: Exception) -> None:
    """The traceback of an unexpected error, and what to do with it."""
    text = "".join(traceback.format_exception(error))
    _print_red(
        f"{text}real_megatron {VERSION} (Python {platform.python_version()}) did not expect this error. Unless the "
        "machine is at fault (memory that has run out, for example), it is a bug: please report it with the traceback "
        "above and the command (CONTRIBUTING.md, Reporting a bug)."
    )


def _print_red(text: str) -> None:
    from real_megatron.terminal import CONSOLE

    CONSOLE.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

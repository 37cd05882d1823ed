"""What a run would do, checked and counted on one CPU: any layout, without weights, GPUs or a process group."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from shutil import disk_usage
from statistics import fmean
from typing import Literal

import numpy as np
from rich.markup import escape
from rich.table import Table

from real_megatron import bridge
from real_megatron.batch.token_tree import branch_tokens
from real_megatron.bridge.table import hf_shapes
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.hardware import Gpu
from real_megatron.hf.checkpoint import HFCheckpoint, check_servers_read_the_same, has_weights
from real_megatron.hf.output import nearest_path
from real_megatron.hf.side_files import read_config
from real_megatron.locks import only_writer
from real_megatron.planning.memory import GIB, built_states, run_memory
from real_megatron.planning.saved_tensors import MicrobatchSize
from real_megatron.planning.storage import Storage
from real_megatron.planning.workload import Layout
from real_megatron.policy.checkpoint import read_state
from real_megatron.rollout.factory import Node, find_engine
from real_megatron.rollout.remote.probe import silent_servers
from real_megatron.rollout.remote.rotary import check_served_rotary
from real_megatron.training.checkpoints import reading
from real_megatron.training.examples import prompt_groups, target_groups
from real_megatron.training.phases import counted, phases, size
from real_megatron.training.preparation import Prepared, export_directory, prepare
from real_megatron.training.resume import check_same_inputs, inputs, saved_inputs
from real_megatron.training.rl import reinforcement_objective
from real_megatron.training.sft import supervised_objective
from real_megatron.training.trial_step import TrialStep, trial_steps

PROBE_S = 3.0
"""Longest wait for an attached server: one that is up answers its health check at once."""

Line = tuple[str, str]
"""What, and what was found."""


@dataclass
class DryRun:
    """What a dry run has found."""

    title: str
    sections: dict[str, list[Line]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """What would not keep the run from starting on the job's machines, or cannot be known here."""


def dry_run(config: RunConfig, command: Literal["train", "sft"], world: int, gpu: Gpu) -> DryRun:
    """Check what `train` or `sft` would check before its ranks meet, and say what each phase of the run would do.

    world: ranks of the run. gpu: what they have; its nodes are the run's.

    Data is read and tokenized as in a run, and the groups of the first step are distributed over all data-parallel
    ranks. Nothing is left in the output directory. Raises what a run would raise, with the same message.
    """
    reinforced = command == "train"
    objective = reinforcement_objective(config) if reinforced else supervised_objective(config)
    load = prompt_groups if reinforced else target_groups
    prepared = prepare(config, load, world, Node(gpu.per_node, trainers_of_a_node(config, world, gpu)))
    model = config.model.model_copy(update={"dtype": "bfloat16"}) if config.model.dtype == "auto" else config.model
    layout = Layout(prepared.description, config.parallel, model, world)
    found = DryRun(f"{command} on {world} {gpu.name}: {_layout(layout)}")
    _check_writable(config.output)
    found.sections["data"] = _data(config, prepared)
    trials = trial_steps(config, objective, prepared, layout)
    found.sections["micro-batches"] = [(trial.about, _trial(config, trial)) for trial in trials]
    longest = _longest_example(config, prepared, found)
    found.sections["memory"] = _memory(config, layout, trials, longest, gpu, found)
    sizes = Storage.of(layout)
    found.sections["files"] = _files(config, prepared, sizes, found)
    if config.is_rl or config.data.eval:
        found.sections["servers"] = _servers(config, prepared, found)
    found.sections["phases"] = phases(config, objective, prepared, world, trials, sizes)
    return found


def trainers_of_a_node(config: RunConfig, world: int, gpu: Gpu) -> int:
    """Training ranks of the node of rank 0: all that fit, but where ranks need several nodes and local servers have
    GPUs of their own, those before `rollout.first_gpu`, since torchrun starts equally many on each node."""
    first = config.rollout.first_gpu
    if world > gpu.per_node and first and not config.rollout.colocate and world % first == 0:
        return first
    return min(world, gpu.per_node)


def _layout(layout: Layout) -> str:
    parallel = layout.parallel
    sizes = [("TP", parallel.tensor), ("PP", parallel.pipeline), ("CP", parallel.context), ("EP", parallel.expert)]
    return ", ".join(f"{name} {size}" for name, size in [*sizes, ("DP", layout.data)] if size > 1) or "one rank"


def _data(config: RunConfig, prepared: Prepared) -> list[Line]:
    data, scale = prepared.data, prepared.scale
    kept = f"{len(data.groups):,} examples ({data.dropped:,} dropped, {data.cut:,} cut), prompts of "
    kept += _lengths(data.groups.prompt_lengths)
    if not config.is_rl:
        kept += ", responses of " + _lengths(data.groups.response_lengths)
    lines = [("training", kept)]
    for name, test_set in prepared.evaluation_sets.items():
        lengths = _lengths(np.array([len(prompt.prompt_ids) for prompt in test_set.prompts]))
        count = f"{len(test_set.prompts):,} examples ({test_set.dropped:,} dropped, {test_set.cut:,} cut)"
        lines.append((name, f"{count}, prompts of {lengths}"))
    paths = zip(scale.texts, scale.tree.paths, strict=True)
    scores = ", ".join(f"{text!r} {' '.join(map(str, path))}" for text, path in paths)
    anchor = f"anchor {scale.anchor_text!r}: {counted(len(scale.anchor_ids), 'token')}"
    branches = (
        "" if scale.tree.flat else f"; their branches add {counted(branch_tokens(scale.tree), 'token')} a response"
    )
    lines.append(("scale", f"{anchor}; scores as tokens: {scores}{branches}"))
    batch = counted(config.batch.prompts, "prompt" if config.is_rl else "example")
    steps, updates = counted(prepared.steps, "step"), counted(prepared.updates, "optimizer update")
    lines.append(("schedule", f"{steps} of {batch}, {updates}"))
    return lines


def _lengths(counts: np.ndarray) -> str:
    return f"{fmean(counts):,.0f} tokens on average, {max(counts):,} at most"


def _trial(config: RunConfig, trial: TrialStep) -> str:
    split = f"; {trial.split:,} of {trial.groups:,} groups are longer and split" if trial.split else ""
    return (
        f"{trial.microbatches:,} a data-parallel rank, {trial.tokens:,} tokens in all, imbalance "
        f"{100 * trial.imbalance:.1f} %; the longest has {trial.longest_tokens:,} tokens, batch.max_tokens is "
        f"{config.batch.max_tokens:,}{split}"
    )


def _longest_example(config: RunConfig, prepared: Prepared, found: DryRun) -> int:
    """Tokens of the longest prompt with one response and the branches that its score is read on. Warns of those beyond
    the budget of a micro-batch, which they then make by themselves."""
    response = config.data.max_response_tokens if config.is_rl else 0
    groups = prepared.data.groups
    totals = groups.prompt_lengths + (response or groups.response_lengths) + branch_tokens(prepared.scale.tree)
    long = int((totals > config.batch.max_tokens).sum())
    if long:
        found.warnings.append(
            f"batch.max_tokens is {config.batch.max_tokens:,}: {long:,} of {len(totals):,} examples with one response "
            f"are longer (up to {totals.max():,} tokens) and make longer micro-batches: raise it to plan for them"
        )
    return int(totals.max())


# --- memory ----------------------------------------------------------------------------------------------------------

_LAYOUT = "raise parallel.tensor or parallel.pipeline, or parallel.expert of a mixture of experts"
_REMEDIES = {
    "activations": "set model.recompute to full, lower batch.max_tokens, or raise parallel.tensor or parallel.context",
    "weights": _LAYOUT,
    "gradients": _LAYOUT,
    "optimizer": "use more ranks, over which parallel.distributed_optimizer shards it, or raise parallel.tensor",
    "the engine's copy of the model": "set rollout.engine to sglang or vllm, whose servers have GPUs of their own",
    "colocated server": "raise rollout.tensor, or switch rollout.colocate off",
}
"""What to change, by the part that takes most of a GPU's memory."""


def _memory(
    config: RunConfig, layout: Layout, trials: Sequence[TrialStep], longest: int, gpu: Gpu, found: DryRun
) -> list[Line]:
    """Of each pipeline stage's fullest rank, the first: its model, gradients and optimizer are built without memory and
    counted, the rest is estimated. Later steps have longer micro-batches than the first: one at the token budget stands
    for them."""
    tokens = max(config.batch.max_tokens, *(trial.longest_tokens for trial in trials), longest)
    rows = ceil(tokens * max(trial.longest_rows / trial.longest_tokens for trial in trials))
    count = max(ceil(trial.microbatches / trial.updates) for trial in trials)
    memory = run_memory(config, layout, MicrobatchSize(tokens, rows), count, gpu, built_states(layout))
    lines = []
    for one in memory.stages:
        parts = {
            "weights": one.states.weights,
            "gradients": one.states.gradients,
            "optimizer": one.states.optimizer,
            "activations": one.activations.total,
            "the engine's model": one.engine,
        }
        held = ", ".join(f"{name} {part / GIB:.1f}" for name, part in parts.items() if part)
        text = f"{one.training / GIB:.1f} of {one.room / GIB:.1f} GiB while it trains ({held}, NCCL)"
        if one.server:
            text += f"; {one.rollout / GIB:.1f} while a server generates, of which it has {one.server / GIB:.1f}"
        lines.append((f"stage {one.stage}" if len(memory.stages) > 1 else "a rank", text))
    full = memory.fullest
    if full.states.total > gpu.memory:  # counted, not estimated: such a run ends as it starts
        raise ConfigError(
            f"weights, gradients and optimizer of a rank of stage {full.stage} take {full.states.total / GIB:.1f} GiB, "
            f"and {gpu.name} has {gpu.memory / GIB:.0f}: {_LAYOUT}, or use more ranks, over which "
            "parallel.distributed_optimizer shards the optimizer (`real-megatron plan` finds layouts that fit)"
        )
    if not memory.fits:
        found.warnings.append(
            f"memory: a GPU of stage {full.stage} needs about {full.peak / GIB:.0f} GiB, of {full.room / GIB:.0f} that "
            f"can be used on {gpu.name}; most of it is {full.binds}: {_REMEDIES[full.binds]} (`real-megatron plan` "
            "finds layouts that fit)"
        )
    return lines


# --- files -----------------------------------------------------------------------------------------------------------


def _check_writable(output: Path) -> None:
    """Raise ConfigError unless a file can be written where `output` is or would be made, and no other run uses it."""
    if output.is_dir():
        with only_writer(output, inside=True):
            pass
    nearest = nearest_path(output)
    try:
        # By doing it: a file system may be read-only or full whatever permissions say.
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=nearest) as directory:
            (Path(directory) / "file").write_bytes(bytes(2**16))
    except OSError as error:
        raise ConfigError(
            f"output: {output} cannot be written: {nearest}: {error.strerror}; choose another, or make room"
        ) from error


def _files(config: RunConfig, prepared: Prepared, sizes: Storage, found: DryRun) -> list[Line]:
    newest, begin = prepared.store.newest(), ""
    if newest is not None:
        step, path = newest
        with reading(path):
            saved = saved_inputs(read_state(path), str(path))
        check_same_inputs(saved, inputs(config, prepared.model_dir, prepared.data.groups), config, str(path))
        begin = f"; the run goes on behind step {step:,} of {prepared.steps:,}"
    lines = [("output", f"{config.output} can be written{begin}")]
    # A new checkpoint is complete before the oldest goes.
    kept = config.checkpoint.keep + bool(config.checkpoint.best)
    more = max(0, kept + 1 - prepared.store.count())
    exported = sizes.weights if config.checkpoint.save_hf else 0
    needed, free = more * sizes.checkpoint + exported, disk_usage(nearest_path(config.output)).free
    lines.append(
        (
            "disk",
            f"{more} × {size(sizes.checkpoint)} of checkpoints (checkpoint.keep and the one being written) and "
            f"{size(exported)} of {export_directory(config)}: {size(needed)}; {size(free)} are free",
        )
    )
    if needed > free:
        found.warnings.append(
            f"output: the run will need {size(needed)} in {config.output}, where {size(free)} are free: choose another "
            "file system, or lower checkpoint.keep"
        )
    lines.append(("model", _weights(config, prepared, found)))
    return lines


def _weights(config: RunConfig, prepared: Prepared, found: DryRun) -> str:
    directory = prepared.model_dir
    if has_weights(directory):
        expected = hf_shapes(bridge.parameters(prepared.description))
        HFCheckpoint(directory).validate(expected, prepared.description.tied)
        return f"{directory}: {len(expected):,} tensors, all there"
    if Path(config.model.path).is_dir():
        found.warnings.append(f"model.path: {directory} holds no weights, which the run itself would not start without")
        return f"{directory}: configuration and tokenizer, no weights"
    return f"{config.model.path}: weights are not downloaded yet; the run does it"


# --- servers ---------------------------------------------------------------------------------------------------------


def _servers(config: RunConfig, prepared: Prepared, found: DryRun) -> list[Line]:
    rollout, kind = config.rollout, find_engine(config.rollout.engine)
    if not kind.server_package:
        return [(rollout.engine, "in the trainer's ranks: no servers")]
    check_served_rotary(rollout.engine, read_config(prepared.model_dir))
    if not rollout.servers:
        check_servers_read_the_same(prepared.model_dir)
        end = rollout.first_gpu + rollout.replicas * rollout.tensor
        whose = "the trainer's, which they release while it trains" if rollout.colocate else "their own"
        ports = f"{rollout.port} to {rollout.port + rollout.replicas - 1}, free now" if rollout.port else "chosen then"
        return [
            (rollout.engine, f"{rollout.replicas} started by the run, with {rollout.python or 'the trainer’s Python'}"),
            ("GPUs", f"{rollout.first_gpu} to {end - 1} of rank 0's node, {rollout.tensor} a server: {whose}"),
            ("ports", ports),
        ]
    urls = [*rollout.servers, *([rollout.router] if rollout.router else [])]
    silent = silent_servers(urls, PROBE_S)
    if silent:
        found.warnings.append(
            f"rollout.servers: {len(silent)} of {len(urls)} do not answer now (the run waits "
            f"{rollout.start_timeout_s:g} s for them): {next(iter(silent))}: {next(iter(silent.values()))}"
        )
    return [(rollout.engine, f"{url} {'does not answer now' if url in silent else 'answers'}") for url in urls]


def table(found: DryRun) -> Table:
    """The findings for a terminal or a file."""
    rows = Table(title=found.title, show_header=False)
    rows.add_column(style="bold")
    rows.add_column()
    rows.add_column(overflow="fold")
    for name, lines in found.sections.items():
        rows.add_section()
        for index, (what, text) in enumerate(lines):
            rows.add_row(name if index == 0 else "", escape(what), escape(text))
    return rows

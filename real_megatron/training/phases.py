"""What each phase of a run would do, in a line each: how much, how often, how many bytes."""

from collections.abc import Sequence
from math import ceil

from real_megatron.config import RunConfig
from real_megatron.objective import Objective
from real_megatron.planning.storage import Storage
from real_megatron.rollout.factory import find_engine
from real_megatron.training.preparation import Prepared, export_directory
from real_megatron.training.trial_step import TrialStep

_TRANSPORTS = {
    "distributed": "by a broadcast in a process group (rollout.sync_host)",
    "tensor": "through shared memory",
    "disk": "as files in the output directory",
}


def phases(
    config: RunConfig, objective: Objective, prepared: Prepared, world: int, trials: Sequence[TrialStep], sizes: Storage
) -> list[tuple[str, str]]:
    """The phases of a step and what follows it, in order: name and what it does."""
    lines = []
    if config.is_rl:
        lines += [("rollout", _rollout(config, world)), ("weight sync", _sync(config, sizes.weights))]
        if passes := _passes(config, objective):
            lines.append(("log-probs", passes))
    counts = " or ".join(f"{ceil(trial.microbatches / trial.steps):,}" for trial in trials)
    updates = counted(config.batch.mini_batches, "optimizer update")
    lines.append(("update", f"{updates}; micro-batches a data-parallel rank: {counts}"))
    every, steps = config.checkpoint.every, prepared.steps
    best = (", and at each evaluation", ", and the best") if config.checkpoint.best else ("", "")
    when = f"{_times(every, steps)}{best[0]}; {config.checkpoint.keep} kept{best[1]}"
    lines.append(("checkpoint", f"{size(sizes.checkpoint)} {when}"))
    if prepared.evaluation_sets:
        every, samples = config.evaluation.every, counted(config.evaluation.samples, "response")
        sets = (f"{name}: {len(found.prompts):,} × {samples}" for name, found in prepared.evaluation_sets.items())
        lines.append(("evaluation", f"{', '.join(sets)}; {_times(every, steps, before=every > 0)}"))
    export = f"{size(sizes.weights)} in {export_directory(config)}" if config.checkpoint.save_hf else "none"
    lines.append(("export", export))
    return lines


def size(count: float) -> str:
    """Bytes as text, in powers of 1000, as of disks and networks."""
    for unit, bytes in (("GB", 1e9), ("MB", 1e6)):
        if count >= bytes:
            return f"{count / bytes:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


def counted(number: int, noun: str) -> str:
    """A number and what it counts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rollout(config: RunConfig, world: int) -> str:
    rollout, prompts = config.rollout, config.batch.prompts
    tokens = prompts * rollout.n * config.data.max_response_tokens
    text = f"{counted(prompts, 'request')} of {counted(rollout.n, 'response')}: at most {tokens:,} tokens; "
    kind = find_engine(rollout.engine)
    if not kind.server_package:
        share = ceil(prompts / (world if kind.on_every_rank else 1))
        return text + f"requests a rank: {share:,}, sequences at once: {rollout.batch_size:,}"
    servers = len(rollout.servers) or rollout.replicas
    share = ceil(prompts / servers)
    text += f"requests a server: {share:,}, {min(share, rollout.concurrency):,} at once"
    return text + ("; while the step before trains" if rollout.staleness else "")


def _sync(config: RunConfig, weights: int) -> str:
    rollout, kind = config.rollout, find_engine(config.rollout.engine)
    text = f"{size(weights)} before each step"
    if not kind.server_package:
        return f"{text}, to the model that each rank generates with"
    how = rollout.weight_sync
    if how == "auto" and kind.broadcasts:
        how = "tensor" if rollout.colocate else "distributed"
    elif how == "auto" and rollout.engine == "vllm":
        how = "disk"
    servers = counted(len(rollout.servers) or rollout.replicas, "server")
    text += f", to {servers} {_TRANSPORTS.get(how, 'in their own way')}"
    kept = rollout.keep_weights and how in ("distributed", "tensor")
    return text + ("; a copy stays in the host memory of rank 0 (rollout.keep_weights)" if kept else "")


def _passes(config: RunConfig, objective: Objective) -> str:
    passes = []
    if objective.needs_ref_logprobs:
        passes.append("a forward pass of the reference (objective.kl)")
    if objective.needs_old_logprobs and config.batch.old_logprobs == "policy":
        passes.append("a forward pass of the policy before the first update (batch.old_logprobs)")
    return " and ".join(passes)


def _times(every: int, steps: int, before: bool = False) -> str:
    """When something happens that happens every `every` steps and at the end, perhaps before the first step, too."""
    count = (ceil(steps / every) if every else 1) + before
    when = ["before the first step"] * before + [f"every {every:,} steps"] * (0 < every < steps)
    return f"{', '.join(when)}{' and ' * bool(when)}at the end ({counted(count, 'time')})"

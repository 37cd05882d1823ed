"""`real-megatron plan`: from a model's name and a number of GPUs to layouts."""

from dataclasses import replace

from real_megatron import bridge
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.hardware import Gpu
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.rotary import longest_sequence
from real_megatron.hf.side_files import read_config
from real_megatron.planning.memory import GIB
from real_megatron.planning.report import layout_text, servers_text
from real_megatron.planning.search import PLACEMENTS, Found, best_layouts
from real_megatron.planning.workload import workload_of


def find_layouts(
    config: RunConfig,
    model: str,
    gpus: int,
    gpu: Gpu,
    placement: str = "auto",
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    revision: str | None = None,
    count: int = 5,
) -> Found:
    """The best layouts for a run on `gpus` GPUs, its servers included.

    config: batch, lengths, responses, objective, head, distributed optimizer, and how servers work; its own layout,
    token budget and placement of servers are not read. model: a directory with config.json, or a name on the hub.
    placement: see `search.PLACEMENTS`, or `none` for a run without servers: supervised, of one response a prompt.
    prompt_tokens, response_tokens: mean lengths; None: half of the longest.

    Raises ConfigError where no layout fits (it names the one that misses by the least, and what takes its memory), or
    placement or lengths contradict the rest; MissingCheckpoint and UnsupportedModel for the model.
    """
    _check_placement(config, gpus, gpu, placement)
    for option, mean, key in (
        ("--prompt-tokens", prompt_tokens, "max_prompt_tokens"),
        ("--response-tokens", response_tokens, "max_response_tokens"),
    ):
        most = getattr(config.data, key)
        if mean is not None and mean > most:
            raise ConfigError(
                f"{option} {mean}: a mean beyond the longest, data.{key} = {most}: lower it, or raise that"
            )
    hf_config = read_config(checkpoint_directory(model, revision, weights=False))
    description = bridge.describe(hf_config, config.model.family)
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    positions = longest_sequence(hf_config)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_prompt_tokens + data.max_response_tokens = {longest}: {model} has {positions} positions "
            "(max_position_embeddings in config.json, or what its rope_type allows); lower one of them"
        )
    workload = workload_of(
        config,
        prompt_tokens or config.data.max_prompt_tokens / 2,
        response_tokens or config.data.max_response_tokens / 2,
    )
    if placement == "none":
        placement, workload = "auto", replace(workload, generates=False, responses=1, forward_passes=0)
    found = best_layouts(
        description, gpus, gpu, workload, config.model, placement, count, config.rollout, config.parallel
    )
    if not found.tried:
        raise ConfigError(
            f"--gpus {gpus}: no layout of as many GPUs divides {model} and gives every data-parallel rank a prompt of "
            f"batch.prompts = {workload.prompts}: choose a multiple of {gpu.per_node} or of a power of two"
        )
    if found.closest is not None:
        fullest = found.closest.memory.fullest
        raise ConfigError(
            f"--gpus {gpus}: none of {found.tried:,} layouts of {model} fits into {gpu.memory / GIB:.0f} GiB of "
            f"{gpu.name}. The closest ({layout_text(found.closest.layout)}; servers: "
            f"{servers_text(found.closest.servers)}) needs {fullest.peak / GIB:.0f} GiB, {fullest.binds} most of all: "
            "use more GPUs, larger ones, or shorter sequences (data.max_prompt_tokens, data.max_response_tokens)"
        )
    return found


def _check_placement(config: RunConfig, gpus: int, gpu: Gpu, placement: str) -> None:
    """Raise ConfigError for servers that a run could not have there."""
    wanted = f"--rollout {placement}"
    if placement not in ("none", *PLACEMENTS):
        raise ConfigError(f"{wanted}: choose one of {', '.join(PLACEMENTS)}, none")
    if placement in ("colocated", "separate") and not config.is_rl:
        raise ConfigError(
            f"{wanted}: objective.name is {config.objective.name}, which trains without servers: leave --rollout out"
        )
    if placement == "colocated" and gpus > gpu.per_node:
        raise ConfigError(
            f"{wanted} --gpus {gpus}: a run starts servers on the {gpu.per_node} GPUs of rank 0's node alone: choose "
            f"separate, or at most {gpu.per_node} GPUs"
        )
    if placement == "colocated" and config.rollout.staleness:
        raise ConfigError(
            f"{wanted}: rollout.staleness is 1, with which servers generate while the policy trains: choose separate, "
            "or set rollout.staleness=0"
        )
    if placement == "separate" and gpus == 1:
        raise ConfigError(f"{wanted} --gpus 1: trainer and servers need a GPU each: choose colocated, or more GPUs")

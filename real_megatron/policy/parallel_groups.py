"""Megatron's process groups: how the ranks of a run are arranged in tensor, pipeline, context and data parallelism."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from real_megatron.config import ParallelConfig
from real_megatron.errors import ConfigError
from real_megatron.policy import cpu, megatron_versions
from real_megatron.runtime import default_device, start_process_group


@dataclass(frozen=True)
class Runtime:
    """This process's place among the ranks. Context-parallel ranks of a micro-batch have one data-parallel rank."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is in the last pipeline stage, which has the output head."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))


def initialize(parallel: ParallelConfig, seed: int = 0) -> Runtime:
    """Join (or start) the process group and form Megatron's groups; those of an earlier call end.

    Under torchrun the world comes from its environment; a single process starts a world of one. Raises ConfigError when
    the parallel sizes do not divide the world, and for a Megatron-Core that is too old.
    """
    megatron_versions.check()
    megatron_versions.fill_gaps()
    cpu.install()
    if not dist.is_initialized():
        start_process_group(parallel.timeout_minutes)
    world_size = dist.get_world_size()
    check_ranks(parallel, world_size)
    end_model_groups()
    form_model_groups(parallel, seed)
    return Runtime(
        device=default_device(),
        rank=dist.get_rank(),
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def form_model_groups(parallel: ParallelConfig, seed: int = 0, **how: Any) -> None:
    """Form Megatron's groups among the ranks of the process group, and seed its random states.

    how: further arguments of Megatron's `initialize_model_parallel`
    """
    with cpu.device_mode():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            distributed_timeout_minutes=parallel.timeout_minutes,
            **how,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def check_ranks(parallel: ParallelConfig, world_size: int) -> None:
    """Raise ConfigError for parallel sizes that do not divide the ranks of a run."""
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        raise ConfigError(
            f"parallel.tensor × parallel.pipeline × parallel.context = {model_size} does not divide the {world_size} "
            f"ranks of this run; start a multiple of {model_size} ranks."
        )
    expert_size = parallel.tensor * parallel.pipeline * parallel.expert
    if world_size % expert_size:
        raise ConfigError(
            f"parallel.tensor × parallel.pipeline × parallel.expert = {expert_size} does not divide the {world_size} "
            f"ranks of this run; start a multiple of {expert_size} ranks."
        )


def end_model_groups() -> None:
    """End Megatron's groups. Megatron itself only forgets them: torch keeps each one, and with gloo a thread that polls
    a hundred times a second."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def no_transformer_engine() -> str:
    """Why Transformer Engine cannot be used; empty if it can."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"Transformer Engine cannot be imported: {error}"
    return ""

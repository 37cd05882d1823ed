"""Process groups, device and dtype: NCCL and bfloat16 with a GPU, gloo and float32 without."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from real_megatron.config import ParallelConfig
from real_megatron.policy import cpu


@dataclass(frozen=True)
class Runtime:
    """Where this process stands in the world. Context-parallel ranks of one micro-batch share a data-parallel rank."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int

    @property
    def is_last_stage(self) -> bool:
        return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def initialize(parallel: ParallelConfig, seed: int = 0) -> Runtime:
    """Join (or start) the process group and form Megatron's groups; those of an earlier call end.

    Under torchrun the world comes from its environment; a single process starts a world of one. Raises ValueError when
    the parallel sizes do not divide the world.
    """
    cpu.install()
    if not dist.is_initialized():
        start_process_group(parallel)
    world_size = dist.get_world_size()
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        raise ValueError(
            f"parallel.tensor × parallel.pipeline × parallel.context = {model_size} does not divide the {world_size} "
            f"ranks of this run; start a multiple of {model_size} ranks."
        )
    _end_model_groups()
    with cpu.device_mode():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Runtime(
        device=default_device(),
        rank=dist.get_rank(),
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _end_model_groups() -> None:
    """End Megatron's groups. Megatron itself only forgets them: torch keeps each one, and with gloo a thread that polls
    a hundred times a second."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the world
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def start_process_group(parallel: ParallelConfig) -> None:
    """`init_process_group` from torchrun's environment, or a world of one process.

    Raises ValueError for one of several tasks that Slurm has started without torchrun: each would be a run of its own.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" not in os.environ and tasks > 1:
        raise ValueError(
            f"Slurm has started {tasks} tasks, but no torchrun: start one task a node, and in it "
            "`torchrun --nnodes … -m real_megatron …` (examples/slurm/train.sbatch)"
        )
    timeout = timedelta(minutes=parallel.timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # As SGLang sets it: both ends of a weight sync must agree.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def host_group(parallel: ParallelConfig) -> dist.ProcessGroup | None:
    """A group of its own for objects on the host, perhaps sent while another thread trains; None in a world of one.

    Collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=parallel.timeout_minutes))


def default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(name: str) -> torch.dtype:
    """The dtype of `model.dtype`: `auto` is bfloat16 with a GPU and float32 without."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)


def has_transformer_engine() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True

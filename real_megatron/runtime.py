"""Where this process runs: device, dtype, its rank among the processes of the run. Knows nothing of Megatron."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from real_megatron.announced import START, check_announced
from real_megatron.errors import ConfigError

T = TypeVar("T")


def default_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(name: str) -> torch.dtype:
    """The dtype of `model.dtype`: `auto` is bfloat16 with a GPU and float32 without."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def rank() -> int:
    """This process's rank; 0 where no process group has been formed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks of this run, as formed or as torchrun has announced it."""
    formed = dist.get_world_size() if dist.is_initialized() else 1
    return max(formed, int(os.environ.get("WORLD_SIZE", "1")))


def barrier() -> None:
    """Wait for all ranks. Collective; nothing in a world that has not been formed."""
    if dist.is_initialized():
        dist.barrier()


def from_rank_0(action: Callable[[], T]) -> T:
    """The result of an action that rank 0 does; its error ends the other ranks too. Collective."""
    if not dist.is_initialized():
        return action()
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as failure:
            error = failure
            outcome[1] = f"{type(failure).__name__}: {failure}"
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise OtherRankFailed(f"rank 0 failed: {outcome[1]}")
    result: T = outcome[0]
    return result


class OtherRankFailed(Exception):
    """Another rank has raised an error, which it reports itself; this rank ends with it."""


def start_process_group(timeout_minutes: int) -> None:
    """`init_process_group` from torchrun's environment, or a world of one process.

    timeout_minutes: `parallel.timeout_minutes`, the longest wait of ranks for each other.

    Raises ConfigError for one of several tasks that Slurm has started without torchrun: each would be a run of its own.
    """
    check_announced()
    timeout = timedelta(minutes=timeout_minutes)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # As SGLang sets it: both ends of a weight sync must agree.
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise ConfigError(f"RANK is set in the environment, {' and '.join(missing)} not: {START}")
        try:
            dist.init_process_group(backend, timeout=timeout)
        except (dist.DistError, ValueError) as error:
            address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
            apart = ConfigError(
                f"the ranks cannot meet at {address} ({str(error).partition(chr(10))[0]}): every node must reach this "
                "address and port, and as many ranks as WORLD_SIZE must start"
            )
            apart.may_pass = isinstance(error, dist.DistError)  # a rank that was lost, a network that failed
            raise apart from error
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def join_torchrun(timeout_minutes: int) -> None:
    """Form the world that torchrun has announced, unless it stands already; a process by itself needs none."""
    if world_size() > 1 and not dist.is_initialized():
        start_process_group(timeout_minutes)


def host_group(timeout_minutes: int) -> dist.ProcessGroup | None:
    """A group of its own for objects on the host, perhaps sent while another thread trains; None in a world of one.

    Collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

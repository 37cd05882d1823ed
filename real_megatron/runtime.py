"""Where this process runs: device, dtype, its rank among the processes of the run. Knows nothing of Megatron."""

import os
import pickle
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from real_megatron.announced import START, check_announced
from real_megatron.errors import ConfigError, UserError

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


def once_a_host(make: Callable[[], T]) -> T:
    """A value that the first rank of each host makes; the others of the host get it pickled. Collective.

    What is pickled may name something of the host: it is unpickled there alone, and the first rank holds its value
    until all have theirs.

    An error on any rank ends all: those of its host with the same one where it is of the kind that one of them says
    (`on_every_rank`), all others with OtherRankFailed.
    """
    if not dist.is_initialized():
        return make()
    values: list[T] = []

    def first_makes() -> bytes:
        values.append(make())
        return pickle.dumps(values[0])

    first = _first_of_host()
    pickled = _all_or_none(first_makes if dist.get_rank() == first else None, first)[first]
    _all_or_none(None if values else lambda: values.append(pickle.loads(pickled)), first)
    return values[0]


def _first_of_host() -> int:
    """The lowest rank on this rank's host. Collective.

    A launcher that says local ranks (LOCAL_RANK) gives those of one start one after another; several starts on one host
    are then a host each. Without it, a host is known by its name.
    """
    local = os.environ.get("LOCAL_RANK")
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, (socket.gethostname(), None if local is None else dist.get_rank() - int(local)))
    return hosts.index(hosts[dist.get_rank()])


def _all_or_none(action: Callable[[], Any] | None, host: int) -> list[Any]:
    """What the action of each rank has returned; None of a rank without one. Raises an error on every rank, where any
    has failed. Collective.

    host: a number that ranks of one host have in common
    """
    result: Any = None
    failed: Exception | None = None
    if action is not None:
        try:
            result = action()
        except Exception as error:
            failed = error
    text = None if failed is None else f"{type(failed).__name__}: {failed}"
    alike = failed if isinstance(failed, UserError) and failed.on_every_rank else None
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, text, host, alike))
    if failed is not None:
        raise failed
    failures = [(there != host, rank) for rank, (_, text, there, _) in enumerate(outcomes) if text is not None]
    if failures:
        elsewhere, rank = min(failures)  # of this host, if there is one
        _, text, _, alike = outcomes[rank]
        if alike is not None and not elsewhere:
            raise alike
        raise OtherRankFailed(f"rank {rank} failed: {text}")
    return [result for result, *_ in outcomes]


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

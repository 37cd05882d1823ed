"""Any rank's model, gradient buffers and optimizer, built without memory: on the meta device, in a world that is not
there.

The classes are those of a run. torch's `fake` process group knows sizes and ranks and answers every collective at once;
tensors on the meta device have shapes and no content. What a rank of thousands would hold is counted in about a second
on one CPU.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from real_megatron.policy import cpu, megatron_versions, parallel_groups
from real_megatron.policy.model import build_model
from real_megatron.policy.optimizer import allocate_moments, build_optimizer, chained, wrap_ddp


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds before its first step."""

    weights: int
    """Of the model's dtype; with the distributed optimizer, Megatron's buffer and its padding."""
    gradients: int
    """Megatron's float32 buffer."""
    optimizer: int
    """Float32 copies of 16-bit weights, and Adam's two moments: this rank's shard. Without counts of steps."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


class _MetaDevice(TorchFunctionMode):
    """Creates and moves tensors on the meta device, whichever device is asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:  # the optimizer asks for CUDA's types by name
            return func(*args).replace("torch.meta.", "torch.cuda." if torch.cuda.is_available() else "torch.")
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func is Tensor.to and len(args) > 1 and not isinstance(args[1], torch.dtype | Tensor):
            args = (args[0], "meta", *args[2:])
        return func(*args, **kwargs)


@contextmanager
def imagined_world(parallel: ParallelConfig, world: int, rank: int) -> Iterator[None]:
    """Megatron's groups as rank `rank` of `world` ranks forms them. No other rank exists, and nothing is sent.

    The process must not have joined a process group. At the end it is as before, random states included. Raises
    ConfigError as `parallel_groups.initialize` does.
    """
    if dist.is_initialized():
        raise RuntimeError("this process has joined a process group: no other world can be imagined in it")
    megatron_versions.check()
    megatron_versions.fill_gaps()
    parallel_groups.check_ranks(parallel, world)
    cpu.install()
    parallel_state.destroy_model_parallel()  # forgets groups of a process group that has ended
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), ExitStack() as undo:
        # The last one first, and each whatever the others raise.
        names = ("_CUDA_RNG_STATE_TRACKER", "_CUDA_RNG_STATE_TRACKER_INITIALIZED")
        undo.callback(vars(megatron_random).update, {name: vars(megatron_random)[name] for name in names})
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        undo.callback(dist.destroy_process_group)
        undo.callback(parallel_groups.end_model_groups)
        undo.callback(vars(dist).update, all_gather_object=dist.all_gather_object)
        vars(dist)["all_gather_object"] = _own_object
        parallel_groups.form_model_groups(parallel, create_gloo_process_groups=False)
        yield


def built_bytes(
    description: ModelDescription, parallel: ParallelConfig, model: ModelConfig, world: int, rank: int
) -> StateBytes:
    """Build what rank `rank` of `world` ranks with GPUs holds before its first step, and count its bytes.

    model.dtype `auto` is bfloat16. Layers are those of the local spec: Transformer Engine's, which need a GPU, have the
    same parameters. Raises ConfigError for a layout that does not divide the ranks or the model.
    """
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    model = model.model_copy(update={"dtype": dtype, "spec": "local"})
    with imagined_world(parallel, world, rank), torch.device("meta"), _MetaDevice():
        chunks = build_model(description, parallel, model)
        with cpu.device_mode():
            wrapped = wrap_ddp(chunks, parallel, overlap=True)
            optimizer = build_optimizer(wrapped, OptimizerConfig(), parallel, gloo=False)
            allocate_moments(chained(optimizer))
        weights = [parameter.data for chunk in chunks for parameter in chunk.parameters()]
        buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        adams = [one.optimizer for one in chained(optimizer)]
        states = [value for adam in adams for state in adam.state.values() for value in state.values()]
        masters = [parameter for adam in adams for group in adam.param_groups for parameter in group["params"]]
        held = _storages(weights)
        return StateBytes(
            weights=sum(held.values()),
            gradients=sum(_storages([buffer.grad_data for buffer in buffers]).values()),
            # Without 16-bit weights, what Adam updates are views of the weights.
            optimizer=sum(size for key, size in _storages([*masters, *states]).items() if key not in held),
        )


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of each storage behind tensors, but for scalars, by a key of its own."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.dim()]
    return {storage._cdata: storage.nbytes() for storage in storages}


def _own_object(gathered: list[Any], value: Any, group: Any = None) -> None:
    """In place of `all_gather_object`, whose sizes travel in tensors: every rank is taken to say the same."""
    gathered[:] = [value] * len(gathered)

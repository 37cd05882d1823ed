"""Training checkpoints through Megatron's dist_checkpointing: written at one parallel layout, read at any other."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from real_megatron.policy import cpu
from real_megatron.policy.megatron_versions import (
    begin_sharded_save,
    load_sharded,
    read_common_state,
    save_sharded,
)
from real_megatron.policy.optimizer import chained, is_torch_adam, steps_everywhere
from real_megatron.policy.optimizer_shards import optimizer_shards
from real_megatron.policy.pending_save import PendingSave

# How the optimizer's state is named and shaped, as Megatron's own code would read it: see optimizer_shards.py. Always
# passed as a copy: Megatron adds the current process groups to the dictionary that it is given.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
# Megatron's name of the float32 copies of weights, in the state of its optimizer that is not distributed.
_COPIES = "fp32_from_fp16_params"


def save(
    directory: str | Path,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> None:
    """Write model, optimizer, schedule, random states and the caller's `state` (plain data). Collective."""
    with _to_save(directory, chunks, optimizer, scheduler, state) as sharded:
        save_sharded(sharded, directory, dict(METADATA))


def begin_save(
    directory: str | Path,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> PendingSave:
    """`save` of all as it is now, which is written while training goes on. Collective."""
    with _to_save(directory, chunks, optimizer, scheduler, state) as sharded:
        return begin_sharded_save(sharded, directory, dict(METADATA))


def read_state(directory: str | Path) -> dict[str, Any]:
    """The caller's `state` of a checkpoint, without touching a model."""
    state: dict[str, Any] = read_common_state(directory)["state"]
    return state


def load(
    directory: str | Path,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> dict[str, Any]:
    """Read what `save` wrote into the running model; returns the caller's state. Collective.

    Random states are restored when the layout and the kind of device are those that wrote them; at another layout they
    have no meaning, and those of the run's seed stay.
    """
    with cpu.device_mode(), steps_everywhere(optimizer):
        common = read_common_state(directory)
        state: dict[str, Any] = common["state"]
        same_layout = state.pop("layout") == _layout()
        sharded = model_state_to_load(chunks)
        if same_layout:
            sharded["random"] = _random_state()
        if _distributed(optimizer):
            _load_counts(optimizer, common["optimizer"])
            sharded["optimizer_shards"] = optimizer_shards(_distributed(optimizer), sharded)
        else:
            sharded["optimizer"] = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=dict(METADATA))
            _keep_empty_copies_local(sharded["optimizer"])
        loaded = load_sharded(sharded, directory)
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{index}"], strict=True)
        if not _distributed(optimizer):
            optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            torch.set_rng_state(loaded["random"]["cpu"])
            torch.cuda.set_rng_state(loaded["random"]["device"])
            get_cuda_rng_tracker().set_states(loaded["random"]["tracker"])
    return state


def model_state_to_load(chunks: Sequence[MegatronModule]) -> dict[str, Any]:
    """The sharded state of the model chunks, to be read from a checkpoint of either layer spec. Collective.

    Without the `_extra_state` objects, which are empty without FP8: which modules have one depends on the spec and on
    the version of Transformer Engine, and where a checkpoint lacks one Megatron's load would fail.
    """
    return {
        f"model{i}": {
            key: LocalNonpersistentObject(None) if "_extra_state" in key else value
            for key, value in chunk.sharded_state_dict(metadata=dict(METADATA)).items()
        }
        for i, chunk in enumerate(chunks)
    }


@contextlib.contextmanager
def _to_save(
    directory: str | Path,
    chunks: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    state: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    Path(directory).mkdir(parents=True, exist_ok=True)
    with cpu.device_mode(), steps_everywhere(optimizer):
        models = {f"model{i}": chunk.sharded_state_dict(metadata=dict(METADATA)) for i, chunk in enumerate(chunks)}
        yield {
            **models,
            **_optimizer_to_save(optimizer, models),
            "random": _random_state(),
            "scheduler": scheduler.state_dict(),
            "state": {**state, "layout": _layout()},
        }


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The chained optimizers, all or none of which are sharded over data-parallel ranks."""
    return [one for one in chained(optimizer) if isinstance(one, DistributedOptimizer)]


def _optimizer_to_save(optimizer: MegatronOptimizer, models: dict[str, Any]) -> dict[str, Any]:
    if not _distributed(optimizer):
        state = optimizer.sharded_state_dict(models, metadata=dict(METADATA))
        _keep_empty_copies_local(state)
        _keep_step_zero(state, optimizer)
        return {"optimizer": state}
    # Not tensors, and the same on all ranks: the settings of parameter groups, and the number of steps.
    states = [
        {**one.state_dict(), "param_state_sharding_type": METADATA["distrib_optim_sharding_type"]}
        for one in chained(optimizer)
    ]
    return {
        "optimizer": states[0] if len(states) == 1 else dict(enumerate(states)),
        "optimizer_shards": optimizer_shards(_distributed(optimizer), models),
    }


def _load_counts(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Give distributed optimizers the settings of their groups and the number of steps, and allocate their moments."""
    optimizer.load_state_dict(state)
    for one in _distributed(optimizer):
        if is_torch_adam(one.optimizer):
            # Megatron gives every parameter the group's one `step` tensor, which torch's Adam increments in place.
            for of_parameter in one.optimizer.state.values():
                of_parameter["step"] = of_parameter["step"].clone()


def _keep_step_zero(state: dict[Any, Any], optimizer: MegatronOptimizer) -> None:
    """Say that no update has been made yet: Megatron leaves out a number of steps that is 0, without which torch's Adam
    cannot be read back.

    state: of one optimizer, or of several by their number in the chain
    """
    chain = chained(optimizer)
    for index, one in enumerate(chain):
        if is_torch_adam(one.optimizer):
            own = state if len(chain) == 1 else state[index]
            of_parameters = own.get("optimizer", own)["state"]
            if of_parameters:
                of_parameters.setdefault("common_step", torch.zeros((), dtype=torch.float32))


def _keep_empty_copies_local(state: dict[Any, Any]) -> None:
    """Leave out the float32 copies of 16-bit weights where an optimizer has no parameters on this rank.

    They are empty lists there, which Megatron would save for all ranks, and could not merge with those of ranks that
    have some. state: of one optimizer, or of several by their number in the chain
    """
    for one in (state, *state.values()):
        if isinstance(one, dict) and _COPIES in one and not any(one[_COPIES]):
            one[_COPIES] = LocalNonpersistentObject(one[_COPIES])


def _random_state() -> ShardedObject:
    """One object per (pipeline, tensor) rank; data- and context-parallel ranks hold replicas."""
    data = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    pipeline, tensor = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    return ShardedObject(
        "random",
        data,
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ),
        (pipeline, tensor),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def _layout() -> dict[str, int | str]:
    """What the random states of a checkpoint belong to: the layout, and the kind of device whose state they are."""
    return {
        "device": torch.device(torch.cuda.current_device()).type,
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
    }

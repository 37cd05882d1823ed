"""Megatron-Core's data-parallel wrapper, Adam and learning-rate schedule, from the run configuration."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from real_megatron.config import OptimizerConfig, ParallelConfig
from real_megatron.errors import ConfigError


def wrap_ddp(
    chunks: Sequence[nn.Module], parallel: ParallelConfig, overlap: bool | None = None
) -> list[DistributedDataParallel]:
    """Wrap each model chunk; gradients are summed over data-parallel ranks in float32, on GPUs while the backward pass
    runs (`overlap`).

    Experts get gradient buffers and, with them, an optimizer of their own. Megatron does that only with expert
    parallelism; here it is so at every layout, as the chain of optimizers must be the same where a checkpoint is
    written and where it is read.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".mlp.experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]  # Megatron's mark
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=torch.cuda.is_available() if overlap is None else overlap,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        # Only the first chunk is bucketed: with several, their communication already overlaps chunk by chunk.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, parallel: ParallelConfig, gloo: bool = True
) -> MegatronOptimizer:
    """Adam with the run's settings, its state sharded over data-parallel ranks unless configured otherwise.

    gloo: whether Megatron has formed groups of gloo beside its own, which gather the state for checkpoints."""
    dtype = chunks[0].config.params_dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.beta1,
            adam_beta2=config.beta2,
            adam_eps=config.eps,
            clip_grad=config.clip_grad,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
        ),
        chunks,
        use_gloo_process_groups=gloo,
    )


def has_fused_adam() -> bool:
    """Whether Megatron-Core takes Adam from Transformer Engine or Apex here, and not from torch."""
    from megatron.core.optimizer import Adam  # what it has found

    return not issubclass(Adam, torch.optim.Adam | torch.optim.AdamW)


def check_warmup(config: OptimizerConfig, total_updates: int) -> None:
    """Raise ConfigError for a warm-up that does not end within the run's optimizer updates."""
    if config.warmup_steps >= total_updates:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.warmup_steps} must be less than the run's {total_updates} optimizer "
            "updates (steps × batch.mini_batches): lower it, or train for more steps"
        )


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, total_updates: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then `config.schedule` down to `min_lr` over the run's `total_updates` optimizer updates.

    Update n (counted from 1) of w = `warmup_steps` trains at lr · n / w: none is lost at a rate of 0.

    Raises ConfigError for a warm-up that does not end within them.
    """
    check_warmup(config, total_updates)
    return OptimizerParamScheduler(
        optimizer,
        # Megatron interpolates from init_lr over n - 1 of w - 1 updates, which is lr · n / w.
        init_lr=config.lr / max(config.warmup_steps, 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(config.warmup_steps - 1, 0),
        lr_decay_steps=total_updates,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_updates,
        wd_incr_style="constant",
    )


def chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that `optimizer` chains: of experts and of all other parameters."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def is_torch_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's own Adam, which counts the steps in the state of each parameter."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def allocate_moments(optimizers: Sequence[MegatronOptimizer]) -> None:
    """Allocate now what the first step of each would allocate: zeros, which that step then uses.

    Around whichever Adam: torch's counts the steps in the state of each parameter, the fused ones of Transformer Engine
    and Apex in the groups.
    """
    for one in optimizers:
        one.init_state_fn(one.optimizer, one.config)
        if is_torch_adam(one.optimizer):
            for state in one.optimizer.state.values():
                state.setdefault("step", torch.zeros((), dtype=torch.float32))


_NO_PARAMETER = "no parameter"


@contextmanager
def steps_everywhere(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let those chained optimizers, and groups, that have no parameters on this rank know how many steps were done.

    A pipeline stage of dense layers has no experts, but Megatron takes the number of steps of all ranks' optimizers
    from the first rank's when it saves. Torch's Adam counts in the state of each parameter, others in the groups.
    """
    inner = [one.optimizer for one in chained(optimizer)]
    groups = [group for adam in inner for group in adam.param_groups]
    in_states = [state["step"] for adam in inner for state in adam.state.values() if "step" in state]
    in_groups = [group["step"] for group in groups if group["params"] and "step" in group]
    without = [adam for adam in inner if not any(group["params"] for group in adam.param_groups)]
    if in_groups:
        for group in groups:
            group["step"] = in_groups[0]
    try:
        if in_states:
            for adam in without:
                adam.state[_NO_PARAMETER] = {"step": in_states[0].clone()}
        yield
    finally:
        for adam in inner:  # also where a checkpoint of such a rank has been read
            adam.state.pop(_NO_PARAMETER, None)

"""Megatron-Core's data-parallel wrapper, Adam and learning-rate schedule, from the run configuration."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import nn

from real_megatron.config import OptimizerConfig, ParallelConfig
from real_megatron.errors import ConfigError


def wrap_ddp(chunks: Sequence[nn.Module], parallel: ParallelConfig) -> list[DistributedDataParallel]:
    """Wrap each model chunk; gradients are summed over data-parallel ranks in float32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=torch.cuda.is_available(),
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        # Only the first chunk is bucketed: with several, their communication already overlaps chunk by chunk.
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: list[DistributedDataParallel], config: OptimizerConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """Adam with the run's settings, its state sharded over data-parallel ranks unless configured otherwise."""
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
    )


def build_scheduler(
    optimizer: MegatronOptimizer, config: OptimizerConfig, total_updates: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then `config.schedule` down to `min_lr` over the run's `total_updates` optimizer updates.

    Update n (counted from 1) of w = `warmup_steps` trains at lr · n / w: none is lost at a rate of 0.

    Raises ConfigError for a warm-up that does not end within them.
    """
    if config.warmup_steps >= total_updates:
        raise ConfigError(
            f"optimizer.warmup_steps = {config.warmup_steps} must be less than the run's {total_updates} optimizer "
            "updates (steps × batch.mini_batches): lower it, or train for more steps"
        )
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


def sharded_torch_adams(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Megatron's distributed optimizers, of those that `optimizer` chains, around torch's own Adam, which Megatron-Core
    takes where neither Transformer Engine nor Apex is installed."""
    return [
        one
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)
    ]


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Allocate now what the first step of `sharded_torch_adams` would allocate: zeros, which that step then uses."""
    for sharded in sharded_torch_adams(optimizer):
        adam = sharded.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

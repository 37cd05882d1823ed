"""Rank functions of the tests of HybridModel."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, apply_factories
from torch import Tensor

from real_megatron import bridge
from real_megatron.config import ModelConfig, ParallelConfig, RunConfig
from real_megatron.hf.side_files import read_config
from real_megatron.objective import build_objective
from real_megatron.policy import cpu, parallel_groups
from real_megatron.policy.hybrid import HybridJudgeModel
from real_megatron.policy.model import build_model
from real_megatron.policy.verify import hf_logits, model_logits
from tests.support.bridge_ranks import TOKENS
from tests.support.policy_ranks import make_groups, make_policy


def logits(hf_dir: str) -> tuple[Tensor, Tensor]:
    """HybridModel's and transformers' logits of the same tokens."""
    parallel_groups.initialize(ParallelConfig())
    description = bridge.describe(read_config(Path(hf_dir)))
    model = ModelConfig(dtype="float32", megatron_class="HybridModel")
    chunks = build_model(description, ParallelConfig(), model)
    assert isinstance(chunks[0], HybridJudgeModel)
    bridge.load_hf(chunks, description, hf_dir)
    tokens = TOKENS % description.vocab_size
    return model_logits(chunks, tokens)[..., : description.vocab_size], hf_logits(hf_dir, tokens)


def stored_parts(config: RunConfig) -> list[tuple[list[str], list[tuple[Any, ...]]]]:
    """Of each model chunk: the names of its parameters, and what its checkpoint says of each tensor and object."""
    return [([name for name, _ in chunk.named_parameters()], _stored(chunk)) for chunk in make_policy(config).chunks]


def _stored(chunk: torch.nn.Module) -> list[tuple[Any, ...]]:
    with cpu.device_mode():
        state = chunk.sharded_state_dict()
        apply_factories(state)
    entries = [entry for entry in nested_values(state) if isinstance(entry, ShardedBase)]
    fields = ("key", "global_shape", "global_offset", "axis_fragmentations", "prepend_axis_num", "replica_id")
    return sorted(tuple(str(getattr(entry, field, None)) for field in fields) for entry in entries)


def gradients(config: RunConfig) -> dict[str, Tensor]:
    """Gradients of one step by parameter, and its loss."""
    policy = make_policy(config)
    kept: dict[str, Tensor] = {}

    def keep(*args: Any, **kwargs: Any) -> float:
        for name, parameter in policy.chunks[0].named_parameters():
            kept[name] = parameter.main_grad.clone()
        return 0.0

    policy.optimizer.get_grad_norm = keep
    metrics = policy.train_step(make_groups(), build_objective(config.objective))
    return {**kept, "loss": torch.tensor(metrics["loss"], dtype=torch.float64)}

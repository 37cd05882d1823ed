"""Estimated bytes of activations: against what torch counts on the CPU, and against what follows from sharding."""

from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from real_megatron import bridge
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.planning.activations import activation_bytes, in_flight
from real_megatron.planning.saved_tensors import CPU, GPU, MicrobatchSize, Shard, head_bytes, layer_bytes
from real_megatron.planning.workload import Layout
from tests.support.ranks import run_ranks
from tests.support.layouts import described
from tests.support.planning_ranks import most_saved
from tests.support.policy_ranks import VOCAB, make_config, write_checkpoint

SIZES = dict(vocab_size=VOCAB, hidden_size=128, head_dim=32, num_attention_heads=4, max_position_embeddings=256)
# Enough experts for the router to matter, behind a dense layer; as many key heads as query heads.
EXPERTS = dict(
    num_hidden_layers=2,
    intermediate_size=320,
    num_key_value_heads=4,
    moe_intermediate_size=32,
    num_experts=32,
    num_experts_per_tok=4,
    mlp_only_layers=[0],
)
MODELS = {
    "Qwen3": Qwen3Config(**SIZES, num_hidden_layers=2, intermediate_size=320, num_key_value_heads=2),
    # A single key head, which two ranks gather; an MLP narrow enough for attention to outweigh it.
    "Llama": LlamaConfig(**SIZES, num_hidden_layers=4, intermediate_size=32, num_key_value_heads=1),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "Qwen3-MoE, softmax of all experts": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False),
}


@dataclass(frozen=True)
class Case:
    """What is trained; on one rank, one micro-batch, float32 unless stated otherwise."""

    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    dtype: str = "float32"
    keys: dict[str, Any] = field(default_factory=dict)
    """Further ones of `model`."""


ONE_RANK = [
    Case("Qwen3"),
    Case("Llama", dtype="bfloat16", keys={"head": "logits"}),
    Case("Qwen3", dtype="bfloat16", keys={"recompute": "full"}),
    Case("Qwen3-MoE", keys={"recompute": "full"}),
    Case("Qwen3-MoE", dtype="bfloat16"),
]
TWO_RANKS = [
    Case("Qwen3", {"tensor": 2}, dtype="bfloat16"),
    Case("Llama", {"tensor": 2, "sequence_parallel": True}),
    Case("Qwen3", {"pipeline": 2}, groups=3),
    Case("Llama", {"pipeline": 2, "virtual_pipeline": 2}, groups=4),
    Case("Llama", {"pipeline": 2}, 3, "bfloat16", {"recompute": "full", "recompute_layers": 2}),
    Case("Qwen3", {"context": 2}),
    Case("Llama", {"context": 2}, keys={"recompute": "selective"}),
    Case("Qwen3-MoE, softmax of all experts", {"expert": 2}, groups=2),
    Case("Qwen3-MoE", {"tensor": 2, "sequence_parallel": True}, dtype="bfloat16"),
]


@pytest.mark.parametrize(("world", "cases"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_saved_tensors_are_those_that_torch_counts(tmp_path, world, cases):
    """To 1 %: what the tables leave out (norms' statistics, indices) is a third of that at these widths, and the
    smallest thing that they list, cosines and sines, is twice that."""
    checkpoints = {name: write_checkpoint(tmp_path / name, config) for name, config in MODELS.items()}
    configs = [
        make_config(
            checkpoints[case.model],
            model={"dtype": case.dtype, **case.keys},
            parallel=case.parallel,
            batch={"max_tokens": 310},
            data={"max_prompt_tokens": 128, "max_response_tokens": 64},
        )
        for case in cases
    ]
    counted = run_ranks(world, most_saved, [(config, case.groups) for config, case in zip(configs, cases, strict=True)])
    errors = {}
    for i, (case, config) in enumerate(zip(cases, configs, strict=True)):
        layout = Layout(bridge.describe(MODELS[case.model]), config.parallel, config.model, world)
        found, expected = [], []
        for rank in range(world):
            most, size, microbatches = counted[rank][i]
            stage = rank if config.parallel.pipeline > 1 else 0
            found.append(most)
            expected.append(activation_bytes(layout, stage, size, microbatches, CPU).saved)
        if config.parallel.expert > 1:
            # The router is not even; both ranks together have all rows.
            found, expected = [sum(found)], [sum(expected)]
        errors[str(case)] = [e / f - 1 for f, e in zip(found, expected, strict=True)]
    print(errors)
    assert not {case: one for case, one in errors.items() if max(map(abs, one)) > 0.01}

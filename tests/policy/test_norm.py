"""RMSNorm against transformers' own."""

import torch
from megatron.core.transformer import TransformerConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from real_megatron.policy.norm import RMSNorm


def config(**kwargs) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **kwargs)


def test_equals_transformers_in_float32_and_bfloat16():
    torch.manual_seed(0)
    ours, theirs = RMSNorm(config(), 16, eps=1e-6), Qwen3RMSNorm(16, eps=1e-6)
    weight = torch.randn(16)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 16).to(dtype)
        ours.weight.data, theirs.weight.data = weight.to(dtype), weight.to(dtype)
        assert torch.equal(ours(x), theirs(x))


def test_the_weight_is_marked_for_the_sequence_parallel_reduction():
    assert RMSNorm(config(), 16).weight.sequence_parallel is False
    parallel = config(tensor_model_parallel_size=2, sequence_parallel=True)
    assert RMSNorm(parallel, 16).weight.sequence_parallel is True

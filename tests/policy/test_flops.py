"""FLOP formulas against torch's own counter on transformers' models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config, Qwen3MoeConfig

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.bridge import describe
from real_megatron.policy import flops
from tests.support.trees import random_tree

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=80,
)


def test_weight_products_equal_a_counted_forward_pass():
    config = Qwen3Config(**COMMON)
    description = describe(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    # transformers computes the angles of positions as a matrix product, which some versions of torch count.
    angles = sum(counter.get_flop_counts().get("Qwen3ForCausalLM.model.rotary_emb", {}).values())
    # Eager attention computes all pairs, the masked ones too: 4 · pairs · heads · head_dim a layer.
    attention = 3 * 4 * tokens**2 * 4 * 16
    expected = counter.get_total_flops() - angles - attention
    assert flops.linear_flops(description) * tokens + flops.head_flops(description) * tokens == expected


def test_attention_counts_admitted_pairs_only():
    description = describe(Qwen3Config(**COMMON))
    tree = SegmentTree((Segment(5), Segment(3, 0), Segment(2, 0)))
    pairs = int(tree.mask().sum())
    assert flops.attention_flops(description, tree) == 3 * 4 * pairs * 4 * 16
    one = flops.training_flops(description, tree, rows=5)
    forward = flops.linear_flops(description) * 10 + 3 * 4 * pairs * 64 + 5 * 2 * 32 * 96
    assert one == pytest.approx(3 * forward)


def test_uneven_flops_are_attention_and_head_token_by_token():
    description = describe(MistralConfig(**COMMON, sliding_window=4))
    tree = SegmentTree((Segment(5), Segment(3, 0), Segment(2, 0)))
    rows = torch.tensor([4, 4, 5, 6, 8])
    per_token = flops.uneven_flops(description, tree, rows)
    assert per_token.sum() == flops.attention_flops(description, tree) + 5 * flops.head_flops(description)
    assert per_token[4] == 3 * 4 * 4 * 64 + 2 * 2 * 32 * 96


@pytest.mark.parametrize("window", [None, 4, 100])
def test_deep_trees_count_what_their_mask_admits(window):
    """Token by token, as shards are balanced, and together. All counts are whole numbers below 2**53."""
    config = Qwen3Config(**COMMON) if window is None else MistralConfig(**COMMON, sliding_window=window)
    description, tree = describe(config), random_tree(3)
    per_token = flops.uneven_flops(description, tree, torch.zeros(0, dtype=torch.long))
    assert torch.equal(per_token, 3 * 4 * 64 * tree.mask(window).sum(-1).double())
    assert per_token.sum() == flops.attention_flops(description, tree)


def test_a_mixture_of_experts_counts_visited_experts():
    moe = Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1
    )
    dense = Qwen3Config(**{**COMMON, "intermediate_size": 2 * 24})
    router = 3 * 2 * 32 * 8
    assert flops.linear_flops(describe(moe)) == flops.linear_flops(describe(dense)) + router


def test_peak_is_known_for_gpus_only(monkeypatch):
    """By the longest name that fits: an H100 PCIe is slower than an H100, and a GH200 has an H200's chip."""
    assert flops.peak_flops(torch.device("cpu")) is None
    for name, peak in (
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(torch.device("cuda", 0)) == peak, name

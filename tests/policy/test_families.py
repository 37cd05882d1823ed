"""Shared prompts, shared beginnings and the branches of scores are exact for every dense family: the step equals
separate sequences in transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from real_megatron.objective import Totals, build_objective
from tests.support.policy_ranks import SIZES, TEN, groups_of, make_config, scale_of, train_all, write_checkpoint
from tests.support.policy_reference import hf_scored
from tests.support.ranks import run_ranks

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
# The longest rows have 38 tokens, 30 more than the model had before its context was extended.
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [10.0] * 8,
    "original_max_position_embeddings": 40,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
FAMILIES = {
    "qwen2, biases, tied, yarn": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3, QK-norm, longrope": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False, rope_parameters=LONGROPE),
    "llama 3, scaled rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral, window shorter than the prompts, dynamic": MistralConfig(
        **SIZES, sliding_window=5, rope_parameters=DYNAMIC
    ),
}
LAYOUTS = [
    {},
    {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": {"recompute": "full"}},
    {"parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, "model": {"recompute": "selective"}},
    {"parallel": {"pipeline": 2}, "batch": {"share_prompt": False, "max_tokens": 256}},
    {"parallel": {"context": 4}, "model": {"recompute": "selective"}},
]


@pytest.mark.parametrize("hf_config", FAMILIES.values(), ids=FAMILIES)
def test_shared_prompts_train_like_separate_sequences(hf_config, tmp_path):
    """fp32, relative 1e-5 of the loss's terms and 1e-4 of the gradient norm: only the order of sums differs."""
    checkpoint = write_checkpoint(tmp_path, hf_config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    config = make_config(checkpoint, scale=TEN)
    groups = groups_of(config, 0, sampled=False)
    scored = hf_scored(model, groups, 1.0, *scale_of(config))
    objective = build_objective(config.objective)
    loss, _ = objective(scored, Totals(len(groups), scored.size, scored.token_logprobs.numel()))
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    configs = [make_config(checkpoint, scale=TEN, **sections) for sections in LAYOUTS]
    for curve, weights in run_ranks(4, train_all, configs, 1)[0]:
        (metrics,) = curve
        size = abs(metrics["loss_term1"]) + abs(metrics["loss_term2"])
        assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5 * size)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert weights.keys() <= model.state_dict().keys()

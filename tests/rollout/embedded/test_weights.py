"""Weights streamed by checkpoint name against `from_pretrained` of the same checkpoint."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from real_megatron.errors import EngineError
from real_megatron.rollout.embedded.weights import copy_weights
from tests.support.rollout_models import tiny_qwen3

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
CONFIGS = {
    "tied": tiny_qwen3(64),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def build(config, seed):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", CONFIGS)
def test_streamed_checkpoint_is_the_model(family, tmp_path):
    source, target = build(CONFIGS[family], 0), build(CONFIGS[family], 1)
    source.save_pretrained(tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert (source(tokens).logits - target(tokens).logits).abs().max() > 0.1
        copy_weights(target, load_file(tmp_path / "model.safetensors").items())
        torch.testing.assert_close(target(tokens).logits, source(tokens).logits, atol=0, rtol=0)


def test_tied_weight_under_its_other_name():
    source, target = build(CONFIGS["tied"], 0), build(CONFIGS["tied"], 1)
    renamed = {("lm_head.weight" if k == "model.embed_tokens.weight" else k): v for k, v in source.named_parameters()}
    copy_weights(target, renamed.items())
    assert torch.equal(target.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert target.lm_head.weight is target.model.embed_tokens.weight


def test_every_misfit_is_named_at_once():
    target = build(CONFIGS["untied"], 0)
    state = dict(target.state_dict())
    del state["lm_head.weight"]
    state["model.norm.weight"] = torch.zeros(3)
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(EngineError) as error:
        copy_weights(target, state.items())
    message = str(error.value)
    assert "1 unknown: model.layers.9.mlp.up_proj.weight" in message
    assert "model.norm.weight [3] (the model has [32])" in message
    assert "2 missing: lm_head.weight, model.norm.weight" in message

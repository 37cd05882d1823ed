"""Rotary frequencies and angles against transformers' rotary modules."""

import pytest
import torch
from transformers import GlmConfig, LlamaConfig, Qwen3Config
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from real_megatron.errors import UnsupportedModel
from real_megatron.policy.rope import inverse_frequencies, rotary_embedding

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_angles_equal_transformers(rope):
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    positions = torch.tensor([0, 1, 2, 1, 2, 300])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 6, 64), positions[None])
    angles = rotary_embedding(inverse_frequencies(config), positions)
    assert angles.shape == (6, 1, 1, 32)
    torch.testing.assert_close(angles[:, 0, 0].cos(), cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles[:, 0, 0].sin(), sin[0], rtol=0, atol=1e-6)


def test_a_rope_that_scales_attention_is_refused():
    config = Qwen3Config(
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e6,
            "original_max_position_embeddings": 32768,
        }
    )
    with pytest.raises(UnsupportedModel, match="'yarn' is not supported"):
        inverse_frequencies(config)


def test_a_partial_rotation_has_the_frequencies_of_its_dimensions():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GlmConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=rope)
    frequencies = inverse_frequencies(config)
    assert frequencies.shape == (8,)
    assert torch.equal(frequencies, GlmRotaryEmbedding(config).inv_freq)

"""Rotary position embedding at arbitrary positions, with Hugging Face's own frequencies."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from real_megatron.errors import UnsupportedModel


def inverse_frequencies(hf_config: PreTrainedConfig) -> Tensor:
    """Inverse frequencies, float32 `[rotary_dim / 2]`, of the checkpoint's rope type (default, linear, llama3, …).

    Raises UnsupportedModel for rope types that scale attention (yarn, longrope) or change with the sequence's length:
    those need more than frequencies.
    """
    rope = getattr(hf_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
        dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope_type not in ("linear", "llama3"):
        raise UnsupportedModel(
            f"config.json: rope type {rope_type!r} is not supported; supported are default, linear and llama3."
        )
    frequencies, attention_scaling = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    assert attention_scaling == 1.0
    return frequencies


def rotary_embedding(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Angles in the shape that Megatron expects, float32 `[T, 1, 1, rotary_dim]`, for integer positions `[T]`."""
    angles = torch.outer(positions.float(), frequencies.to(positions.device))
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]

"""Angles of the rotary position embedding at arbitrary positions."""

import torch
from torch import Tensor


def rotary_embedding(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Angles in the shape that Megatron expects, float32 `[T, 1, 1, rotary_dim]`, for integer positions `[T]`."""
    angles = torch.outer(positions.float(), frequencies.to(positions.device))
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]

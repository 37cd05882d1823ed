"""RMSNorm for Megatron-Core's local layer spec, which has none that works under sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + ε) · w, computed in float32, returned in x's dtype.

    Under sequence parallelism each rank normalises its shard of the tokens, so the weight's gradient is marked for
    Megatron's all-reduce over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        init = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(init(hidden_size, dtype=config.params_dtype))
        # Megatron reads this mark of a parameter.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # torch has none

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # once: autograd saves what it returns, and of 16-bit inputs that is a copy
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)

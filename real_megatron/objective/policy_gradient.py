"""Term 1: the policy-gradient loss of sampled tokens, plain or with PPO clipping, and truncated importance weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from real_megatron.config import RatioLevel


class TokenLoss(NamedTuple):
    """Per-token loss [N_tok] and, per token, whether the importance ratio was clipped [N_tok] (0 or 1)."""

    loss: Tensor
    clipped: Tensor


class Weights(NamedTuple):
    """Importance weights without gradient, per token [N_tok] and per response [N], and whether a token's weight was
    truncated [N_tok] (0 or 1)."""

    token: Tensor
    trajectory: Tensor
    clipped: Tensor


def plain_loss(token_logprobs: Tensor, token_advantages: Tensor) -> TokenLoss:
    """−A log π, per token: REINFORCE."""
    return TokenLoss(-token_advantages * token_logprobs, torch.zeros_like(token_logprobs))


def ppo_loss(token_logprobs: Tensor, old_logprobs: Tensor, token_advantages: Tensor, clip: float) -> TokenLoss:
    """−min(ρ A, clip(ρ, 1−ε, 1+ε) A) with ρ = π/μ, per token (Schulman et al. 2017, equation 7)."""
    ratio = (token_logprobs - old_logprobs).exp()
    free = ratio * token_advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * token_advantages
    return TokenLoss(-torch.minimum(free, clipped), (clipped < free).to(ratio.dtype))


def truncated_weights(
    token_logprobs: Tensor,
    old_logprobs: Tensor,
    token_trajectory: Tensor,
    trajectories: int,
    level: RatioLevel,
    cap: float,
) -> Weights:
    """min(π/μ, cap) of policy π and sampler μ.

    `sequence`: the ratio of whole responses, the product over their loss-carrying tokens; wherever the cap does not
    bind, expectations under μ become those under π. `token`: each token's own ratio, and 1 for the response as a whole:
    less variance, but biased.
    """
    log_ratio = (token_logprobs.detach() - old_logprobs).double()
    zeros = log_ratio.new_zeros(trajectories)
    free, whole = log_ratio.exp(), zeros + 1
    if level == "sequence":
        whole = zeros.index_add(0, token_trajectory, log_ratio).exp()
        free, whole = whole[token_trajectory], whole.clamp(max=cap)
    dtype = token_logprobs.dtype
    return Weights(free.clamp(max=cap).to(dtype), whole.to(dtype), (free > cap).to(dtype))

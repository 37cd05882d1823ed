"""Term 1: the policy-gradient loss of sampled tokens, plain or with PPO clipping, and truncated importance weights."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ratio = Literal["none", "ppo", "truncated_is"]


class TokenLoss(NamedTuple):
    """Per-token loss [N_tok] and, per token, whether the importance ratio was cut [N_tok] (0 or 1)."""

    loss: Tensor
    clipped: Tensor


def log_ratio(token_logprobs: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """[N_tok] log π/μ of each token under the policy and its sampler, detached; zero when the sampler is unknown."""
    if old_logprobs is None:
        return torch.zeros_like(token_logprobs)
    return token_logprobs.detach() - old_logprobs


def sequence_log_ratio(log_ratios: Tensor, token_trajectory: Tensor, trajectories: int) -> Tensor:
    """[N] log π(c)/μ(c) of whole responses: the sum over their tokens."""
    zeros = torch.zeros(trajectories, dtype=torch.float64, device=log_ratios.device)
    return zeros.index_add(0, token_trajectory, log_ratios.double()).to(log_ratios.dtype)


def truncated_weight(log_ratios: Tensor, cap: float) -> Tensor:
    """min(π/μ, cap), elementwise. Whole responses' weights make expectations under μ those under π while the cap does
    not bind; tokens' weights have less variance and leave a bias."""
    return log_ratios.exp().clamp(max=cap)


def plain_loss(token_logprobs: Tensor, token_advantages: Tensor) -> TokenLoss:
    """−A log π, per token: REINFORCE."""
    return TokenLoss(-token_advantages * token_logprobs, torch.zeros_like(token_logprobs))


def ppo_loss(token_logprobs: Tensor, old_logprobs: Tensor, token_advantages: Tensor, clip: float) -> TokenLoss:
    """−min(ρ A, clip(ρ, 1−ε, 1+ε) A) with ρ = π/μ, per token (Schulman et al. 2017, equation 7)."""
    ratio = (token_logprobs - old_logprobs).exp()
    free = ratio * token_advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * token_advantages
    return TokenLoss(-torch.minimum(free, clipped), (clipped < free).to(ratio.dtype))

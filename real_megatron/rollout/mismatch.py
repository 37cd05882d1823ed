"""How far the engine that samples is from the policy that trains, on the same tokens with the same weights."""

from collections.abc import Sequence

import torch


def mismatch(
    engine_logprobs: Sequence[Sequence[float]],
    policy_logprobs: Sequence[Sequence[float]],
    masks: Sequence[Sequence[bool]] | None = None,
) -> dict[str, float]:
    """Per-token difference d = log π_policy − log π_engine over sampled tokens.

    engine_logprobs, policy_logprobs: per trajectory, per token, natural logarithms, at the same temperature
    masks: True where the token was sampled (`Trajectory.loss_mask`); default: all

    Returns `mean` and `max` of |d|; two estimates of KL(engine ‖ policy) from the engine's samples: `kl_k1` = mean(−d),
    unbiased, and `kl_k3` = mean(e^d − 1 − d), unbiased and never negative (Schulman, Approximating KL Divergence);
    `tokens`, how many were compared. All zero without tokens.

    Raises ValueError naming the trajectory whose lengths differ.
    """
    differences: list[torch.Tensor] = []
    masks = masks if masks is not None else [[True] * len(row) for row in engine_logprobs]
    for i, (engine, policy, mask) in enumerate(zip(engine_logprobs, policy_logprobs, masks, strict=True)):
        if not len(engine) == len(policy) == len(mask):
            raise ValueError(
                f"trajectory {i}: {len(engine)} log-probs of the engine, {len(policy)} of the policy, "
                f"{len(mask)} of the mask"
            )
        d = torch.tensor(policy, dtype=torch.float64) - torch.tensor(engine, dtype=torch.float64)
        differences.append(d[torch.tensor(mask, dtype=torch.bool)])
    d = torch.cat(differences) if differences else torch.empty(0, dtype=torch.float64)
    if not len(d):
        return {"mean": 0.0, "max": 0.0, "kl_k1": 0.0, "kl_k3": 0.0, "tokens": 0.0}
    return {
        "mean": d.abs().mean().item(),
        "max": d.abs().max().item(),
        "kl_k1": -d.mean().item(),
        "kl_k3": (d.exp() - 1 - d).mean().item(),
        "tokens": float(len(d)),
    }

"""Train–inference mismatch: how far the engine that samples is from the policy that trains, on the sampled tokens."""

from torch import Tensor

from real_megatron.objective.metrics import maximum, pair
from real_megatron.objective.types import Metrics


def mismatch_metrics(policy_logprobs: Tensor, engine_logprobs: Tensor) -> Metrics:
    """Per-token difference d = log π_policy − log π_engine over sampled tokens `[n]`, natural logarithms.

    `mean` and `max` of |d|, and two estimates of KL(engine ‖ policy) from the engine's samples: `kl_k1` = mean(−d),
    unbiased, and `kl_k3` = mean(e^d − 1 − d), unbiased and never negative (Schulman, Approximating KL Divergence).
    With equal weights on both sides this is numerics alone; with stale weights, or another sampling temperature than 1,
    it also holds how far the policies are apart.
    """
    d = (policy_logprobs.detach() - engine_logprobs).double()
    return {
        "mismatch/mean": pair(d.abs()),
        "mismatch/max": maximum(d.abs()),
        "mismatch/kl_k1": pair(-d),
        "mismatch/kl_k3": pair(d.exp() - 1 - d),
    }

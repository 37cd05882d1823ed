"""Train–inference mismatch: how log-probs of the engine that samples differ from those of the policy that trains."""

from torch import Tensor

from real_megatron.objective.metrics import maximum, pair
from real_megatron.objective.types import MetricSums


def mismatch_metrics(policy_logprobs: Tensor, engine_logprobs: Tensor) -> MetricSums:
    """Per-token difference d = log π_policy − log π_engine over sampled tokens `[n]`, natural logarithms.

    `mean` and `max` of |d|, and two estimates of KL(engine ‖ policy) from the engine's samples: `kl_k1` = mean(−d),
    unbiased, and `kl_k3` = mean(e^d − 1 − d), unbiased and never negative (Schulman, Approximating KL Divergence).
    Both are at the sampling temperature. With equal weights on both sides only numerical differences are left; with
    older weights in the engine the difference of the policies is included.
    """
    d = (policy_logprobs.detach() - engine_logprobs).double()
    return {
        "mismatch/mean": pair(d.abs()),
        "mismatch/max": maximum(d.abs()),
        "mismatch/kl_k1": pair(-d),
        "mismatch/kl_k3": pair(d.exp() - 1 - d),
    }

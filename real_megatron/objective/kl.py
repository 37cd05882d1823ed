"""The KL term towards a reference policy."""

from torch import Tensor


def k3(token_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N_tok] q/π − log(q/π) − 1 of policy π and reference q at sampled tokens: Schulman's k3 estimator.

    Never negative, zero only where both agree. Its mean over tokens sampled from π is KL(π ‖ q); the mean of its
    gradient is that of KL(q ‖ π), as in GRPO, whose minimum is the same.
    """
    log_ratio = ref_logprobs - token_logprobs
    return log_ratio.expm1() - log_ratio

"""A module of rewards as a user would write it: one registered, and one that is an attribute."""

from collections.abc import Sequence

from torch import Tensor

from real_megatron.objective import ResponseView, Reward, RewardOptions, register_reward


def absolute(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = −|ŷ − y*|."""
    return -(score_logprobs.exp() @ values - labels).abs()


ABSOLUTE = Reward(absolute, floor=lambda values, options: values.min() - values.max())


@register_reward("brief_and_weighted", floor=-6.0, reads_responses=True)
def brief_and_weighted(
    score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions, responses: Sequence[ResponseView]
) -> Tensor:
    """−|ŷ − y*| times the row's `weight` (1 without one), less a tenth for each word of the response."""
    weights = score_logprobs.new_tensor([response.meta.get("weight", 1.0) for response in responses])
    words = score_logprobs.new_tensor([len(response.text.split()) for response in responses])
    return weights * absolute(score_logprobs, values, labels, options) - 0.1 * words

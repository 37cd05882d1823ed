"""Two rewards of your own. In the configuration: `objective.reward: reward:absolute`."""

from collections.abc import Sequence

from torch import Tensor

from real_megatron.objective import ResponseView, RewardOptions, register_reward
from real_megatron.objective.rail import expected_score


def worst(values: Tensor, options: RewardOptions) -> Tensor:
    """The floor: no answer can have a larger error (ŷ tends to 0 as probability leaves the score tokens)."""
    return values.min().clamp(max=0) - values.max().clamp(min=0)


@register_reward("absolute", floor=worst)
def absolute(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = −|ŷ − y*|: outliers count less than under the squared error."""
    return -(expected_score(score_logprobs, values, options.probabilities) - labels).abs()


@register_reward("brief", floor=lambda values, options: worst(values, options) - 1.0, reads_responses=True)
def brief(
    score_logprobs: Tensor,
    values: Tensor,
    labels: Tensor,
    options: RewardOptions,
    responses: Sequence[ResponseView],
) -> Tensor:
    """r = −|ŷ − y*| − min(words / 1000, 1): of two critiques that predict alike, the shorter one is better."""
    words = labels.new_tensor([len(response.text.split()) for response in responses])
    return absolute(score_logprobs, values, labels, options) - (words / 1000).clamp(max=1)

"""Rewards: differentiable functions of the score distribution and the label, by name (docs/extending.md).

A reward is one function `(score_logprobs [N, S], values [S], labels [N], options) -> [N]`, plus the reward of a
response without an answer. With `reads_responses` it has a fifth argument, one `ResponseView` per response. Register
another with `@register_reward` and name it in `objective.reward` as `module:name`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from real_megatron.config import Probabilities
from real_megatron.errors import ConfigError
from real_megatron.objective.rail import expected_score, label_index, label_logprob
from real_megatron.objective.types import ResponseView
from real_megatron.registry import Registry, calling_module

LOGPROB_FLOOR = math.log(1e-3)
"""log π(y*) has no lowest value: a response without an answer counts as log π(y*) = log 0.001."""


@dataclass(frozen=True)
class RewardOptions:
    """Settings that rewards have in common."""

    lam: float = 1.0
    """λ, weight of log π(y*)."""
    probabilities: Probabilities = "full"
    """Variant of ŷ."""


RewardFunction = Callable[[Tensor, Tensor, Tensor, RewardOptions], Tensor]
ResponseRewardFunction = Callable[[Tensor, Tensor, Tensor, RewardOptions, Sequence[ResponseView]], Tensor]
FloorFunction = Callable[[Tensor, RewardOptions], Tensor | float]


@dataclass(frozen=True)
class Reward:
    """A reward and its floor, the reward of a response that has no answer."""

    function: Callable[..., Tensor]
    """A `RewardFunction`, or with `reads_responses` a `ResponseRewardFunction`."""
    floor: FloorFunction
    """Function of (values [S], options)."""
    reads_responses: bool = False


REWARDS: Registry[Reward] = Registry("reward", "objective.reward")
R = TypeVar("R", bound=Callable[..., Tensor])


@overload
def register_reward(
    name: str, floor: float | FloorFunction, *, reads_responses: Literal[False] = False
) -> Callable[[RewardFunction], RewardFunction]: ...


@overload
def register_reward(
    name: str, floor: float | FloorFunction, *, reads_responses: Literal[True]
) -> Callable[[ResponseRewardFunction], ResponseRewardFunction]: ...


def register_reward(name: str, floor: float | FloorFunction, *, reads_responses: bool = False) -> Callable[[R], R]:
    """Decorator that adds a reward to `REWARDS`.

    floor: reward of a response without an answer: a number, or a function of (values [S], options).
    reads_responses: the function has a fifth argument, `responses`, one `ResponseView` per response, [N].
    """
    module = calling_module()
    floor_function: FloorFunction = floor if callable(floor) else lambda values, options: float(floor)

    def add(function: R) -> R:
        REWARDS.register(name, Reward(function, floor_function, reads_responses), module)
        return function

    return add


def find_reward(name: str) -> Reward:
    """The reward of a plain name, or of `module:name`: what that module registers, or its attribute.

    Raises ConfigError for an unknown name or module, and for an attribute that is no `Reward`.
    """
    reward = REWARDS.find(name)
    if not isinstance(reward, Reward):
        raise ConfigError(
            f"{REWARDS.key}: {name!r} is a {type(reward).__name__}, not a Reward; register the function with "
            "@register_reward (docs/extending.md)"
        )
    return reward


def compute_rewards(
    reward: Reward,
    score_logprobs: Tensor,
    has_answer: Tensor,
    values: Tensor,
    labels: Tensor,
    options: RewardOptions,
    floor: float | None = None,
    responses: Sequence[ResponseView] | None = None,
) -> Tensor:
    """[N] rewards with gradient; responses without an answer get the floor (`floor`, or the reward's own), a constant.

    Rows without an answer are replaced before the function sees them, so that nothing in them, not even a NaN,
    reaches a value or a gradient. ValueError where the reward reads responses and there are none.
    """
    uniform = -math.log(score_logprobs.shape[-1])
    safe = torch.where(has_answer[:, None], score_logprobs, uniform)
    if reward.reads_responses:
        if responses is None and len(has_answer):
            raise ValueError("the reward reads responses, but the batch has none: fill ScoredBatch.responses")
        r = reward.function(safe, values, labels, options, responses or [])
    else:
        r = reward.function(safe, values, labels, options)
    lowest = reward.floor(values, options) if floor is None else floor
    return torch.where(has_answer, r, torch.as_tensor(lowest, dtype=r.dtype, device=r.device))


def lowest_squared_error(values: Tensor, options: RewardOptions) -> Tensor:
    """−(high − low)², the worst prediction for the worst label. With `full` probabilities ŷ tends to 0 as other
    tokens become more probable, so 0 counts as a value there."""
    high, low = values.max(), values.min()
    if options.probabilities == "full":
        high, low = high.clamp(min=0), low.clamp(max=0)
    return -((high - low) ** 2)


@register_reward("real", floor=lambda values, o: lowest_squared_error(values, o) + o.lam * LOGPROB_FLOOR)
def real(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = −(ŷ − y*)² + λ log π(y*): the regression-aware reward of arXiv 2603.17145."""
    error = expected_score(score_logprobs, values, options.probabilities) - labels
    r = -(error**2)
    if options.lam:
        r = r + options.lam * label_logprob(score_logprobs, values, labels)
    return r


@register_reward("answer_logprob", floor=LOGPROB_FLOOR)
def answer_logprob(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = log π(y*): the answer log-likelihood of JEPO, whose mean over CoTs is a lower bound of log π(y* | x)."""
    return label_logprob(score_logprobs, values, labels)


@register_reward("binary", floor=0.0)
def binary(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = π(y*): the 0/1 reward 1[score = y*] with the sampled score integrated out.

    E_score 1[score = y*] = π(y*), so with β = 1 Terms 1 and 2 have the same expectation as REINFORCE on CoT and score
    token with the 0/1 reward, with less variance: a binary baseline that does train its score token.
    """
    return label_logprob(score_logprobs, values, labels).exp()


@register_reward("binary_greedy", floor=0.0)
def binary_greedy(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = 1 if the most probable score is the nearest to the label, else 0. Piecewise constant: no Term 2."""
    return (score_logprobs.argmax(dim=-1) == label_index(labels, values)).to(score_logprobs.dtype)

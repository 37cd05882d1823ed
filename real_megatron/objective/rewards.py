"""Rewards: differentiable functions of the score distribution and the label, by name (docs/extending.md).

A reward is one function `(score_logprobs [N, S], values [S], labels [N], options) -> [N]`, plus the reward of a
response without an answer. With `reads_responses` it has one more argument, a `ResponseView` per response, and with
`samples_score` one more, the scores that were sampled. Register another with `@register_reward` and name it in
`objective.reward` as `module:name`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

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
    margin: FloorFunction | None = None
    """Of rewards that have no lowest value, or one far below what answers get: where responses are compared, one
    without an answer gets this much less than the worst answer of its group. Function of (values [S], options)."""
    reads_responses: bool = False
    samples_score: bool = False
    """The score is sampled, an action like any other token: responses end with it, and Term 1 trains it."""
    has_gradient: bool = True
    """False: constant in the score distribution, so that there is no Term 2."""


REWARDS: Registry[Reward] = Registry("reward", "objective.reward")
R = TypeVar("R", bound=Callable[..., Tensor])


@overload
def register_reward(
    name: str,
    floor: float | FloorFunction,
    *,
    margin: float | FloorFunction | None = None,
    reads_responses: Literal[False] = False,
    samples_score: Literal[False] = False,
    has_gradient: bool = True,
) -> Callable[[RewardFunction], RewardFunction]: ...


@overload
def register_reward(
    name: str,
    floor: float | FloorFunction,
    *,
    margin: float | FloorFunction | None = None,
    reads_responses: Literal[True],
    samples_score: Literal[False] = False,
    has_gradient: bool = True,
) -> Callable[[ResponseRewardFunction], ResponseRewardFunction]: ...


@overload
def register_reward(
    name: str,
    floor: float | FloorFunction,
    *,
    margin: float | FloorFunction | None = None,
    reads_responses: bool = False,
    samples_score: Literal[True],
    has_gradient: bool = True,
) -> Callable[[R], R]: ...


def register_reward(
    name: str,
    floor: float | FloorFunction,
    *,
    margin: float | FloorFunction | None = None,
    reads_responses: bool = False,
    samples_score: bool = False,
    has_gradient: bool = True,
) -> Callable[[R], R]:
    """Decorator that adds a reward to `REWARDS`.

    floor: reward of a response without an answer: a number, or a function of (values [S], options).
    margin: where responses are compared, how much less than the worst answer of its group such a response gets, in
        place of the floor: a number, or a function like the floor. None: the floor there too.
    reads_responses: the function has a further argument, `responses`, one `ResponseView` per response, [N].
    samples_score: the score token is sampled and trained by Term 1; the function's last argument is `sampled`, [N]
        int64: the index of the sampled score, -1 where the sampled token is no score.
    has_gradient: False for a reward that is constant in the score distribution: it has no Term 2.
    """
    module = calling_module()
    floor_function = _function(floor)
    margin_function = None if margin is None else _function(margin)

    def add(function: R) -> R:
        REWARDS.register(
            name,
            Reward(function, floor_function, margin_function, reads_responses, samples_score, has_gradient),
            module,
        )
        return function

    return add


def _function(number: float | FloorFunction) -> FloorFunction:
    return number if callable(number) else lambda values, options: float(number)


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
    sampled: Tensor | None = None,
) -> Tensor:
    """[N] rewards with gradient; responses without an answer get the floor (`floor`, or the reward's own), a constant.

    Rows without an answer are replaced before the function sees them, so that nothing in them, not even a NaN,
    reaches a value or a gradient. ValueError where the reward reads responses or sampled scores and there are none.
    """
    uniform = -math.log(score_logprobs.shape[-1])
    safe = torch.where(has_answer[:, None], score_logprobs, uniform)
    further: list[Any] = []
    if reward.reads_responses:
        if responses is None and len(has_answer):
            raise ValueError("the reward reads responses, but the batch has none: fill ScoredBatch.responses")
        further.append(responses or [])
    if reward.samples_score:
        if sampled is None and len(has_answer):
            raise ValueError(
                "the reward needs sampled scores, but responses end at their anchor: sample the score token too, and "
                "fill ScoredBatch.sampled"
            )
        further.append(torch.zeros_like(has_answer, dtype=torch.long) if sampled is None else sampled)
    r = reward.function(safe, values, labels, options, *further)
    lowest = reward.floor(values, options) if floor is None else floor
    return torch.where(has_answer, r, torch.as_tensor(lowest, dtype=r.dtype, device=r.device))


def below_the_worst(rewards: Tensor, has_answer: Tensor, group: Tensor, margin: Tensor | float) -> Tensor:
    """[N] rewards, where responses without an answer get `margin` less than the worst answer of their group. Groups
    without any answer are left as they are. `group` [N] int64, 0..G-1, G ≤ N."""
    answered = torch.where(has_answer, rewards, torch.inf)
    worst = torch.full_like(rewards, torch.inf).scatter_reduce(0, group, answered, "amin")[group]
    return torch.where(has_answer | worst.isinf(), rewards, worst - margin)


def lowest_squared_error(values: Tensor, options: RewardOptions) -> Tensor:
    """−(high − low)², the worst prediction for the worst label. With `full` probabilities ŷ tends to 0 as other
    tokens become more probable, so 0 counts as a value there."""
    high, low = values.max(), values.min()
    if options.probabilities == "full":
        high, low = high.clamp(min=0), low.clamp(max=0)
    return -((high - low) ** 2)


def squared_step(values: Tensor, options: RewardOptions) -> Tensor:
    """The squared error of a prediction that is off by one score: by the mean distance of neighbouring values."""
    return ((values.max() - values.min()) / (len(values) - 1)) ** 2


@register_reward(
    "real", floor=lambda values, o: lowest_squared_error(values, o) + o.lam * LOGPROB_FLOOR, margin=squared_step
)
def real(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = −(ŷ − y*)² + λ log π(y*): the regression-aware reward of arXiv 2603.17145."""
    error = expected_score(score_logprobs, values, options.probabilities) - labels
    r = -(error**2)
    if options.lam:
        r = r + options.lam * label_logprob(score_logprobs, values, labels)
    return r


@register_reward("answer_logprob", floor=LOGPROB_FLOOR, margin=1.0)
def answer_logprob(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = log π(y*): the answer log-likelihood of JEPO, whose mean over CoTs is a lower bound of log π(y* | x)."""
    return label_logprob(score_logprobs, values, labels)


@register_reward("binary", floor=0.0, samples_score=True, has_gradient=False)
def binary(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions, sampled: Tensor) -> Tensor:
    """r = 1 if the sampled score is the nearest to the label, else 0: the usual reward of RLOO and GRPO. 0 too where
    the token behind the anchor is no score."""
    return (sampled == label_index(labels, values)).to(score_logprobs.dtype)


@register_reward("binary_expected", floor=0.0)
def binary_expected(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = π(y*): `binary` with the sampled score integrated out.

    E_score 1[score = y*] = π(y*), so with β = 1 Terms 1 and 2 have the same expectation as REINFORCE on CoT and score
    token with the 0/1 reward, with less variance.
    """
    return label_logprob(score_logprobs, values, labels).exp()


@register_reward("binary_greedy", floor=0.0, has_gradient=False)
def binary_greedy(score_logprobs: Tensor, values: Tensor, labels: Tensor, options: RewardOptions) -> Tensor:
    """r = 1 if the most probable score is the nearest to the label, else 0. Piecewise constant: no Term 2."""
    return (score_logprobs.argmax(dim=-1) == label_index(labels, values)).to(score_logprobs.dtype)

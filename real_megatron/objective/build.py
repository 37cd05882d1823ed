"""From the configuration to an objective."""

from typing import TYPE_CHECKING

from real_megatron.objective.advantages import minimum_group_size
from real_megatron.objective.reinforce import ReinforceObjective
from real_megatron.objective.rewards import RewardOptions, find_reward
from real_megatron.objective.sft import SupervisedObjective

if TYPE_CHECKING:
    from real_megatron.config import ObjectiveConfig

SUPERVISED = ("sft", "raft", "tract")


def build_objective(config: "ObjectiveConfig") -> ReinforceObjective | SupervisedObjective:
    """The objective that `config.name` and its settings describe. Raises ValueError for an unknown reward."""
    if config.name in SUPERVISED:
        if config.name == "sft":
            return SupervisedObjective(probabilities=config.probabilities)
        return SupervisedObjective(squared=1.0, lam=config.lam, probabilities=config.probabilities)
    return ReinforceObjective(
        reward=find_reward(config.reward),
        options=RewardOptions(lam=config.lam, probabilities=config.probabilities),
        beta=config.beta,
        term1=config.term1,
        baseline=config.baseline,
        std_normalize=config.std_normalize,
        clamp=config.clamp,
        token_mean=config.token_mean,
        kl=config.kl,
        ratio=config.ratio,
        clip=config.clip,
        is_cap=config.is_cap,
        is_level=config.is_level,
        floor=config.no_anchor_reward,
    )


def check(config: "ObjectiveConfig", *, updates: int, responses: int) -> None:
    """Raise ValueError when the objective does not fit the batch: `updates` optimizer updates per rollout batch
    (batch.updates), `responses` per prompt (rollout.n)."""
    if config.name in SUPERVISED:
        return
    if updates > 1 and config.ratio == "none":
        raise ValueError(
            f"batch.updates is {updates}: after the first update the responses are no longer the policy's own and need "
            "an importance ratio; set objective.ratio to ppo or truncated_is, or batch.updates to 1"
        )
    needed = minimum_group_size(config.baseline, config.std_normalize)
    if config.term1 and responses < needed:
        raise ValueError(
            f"rollout.n is {responses}: the {config.baseline} baseline compares responses to one prompt; set "
            f"rollout.n to {needed} or more, or objective.baseline to none and objective.std_normalize to false"
        )

"""From the configuration to an objective."""

from typing import TYPE_CHECKING

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

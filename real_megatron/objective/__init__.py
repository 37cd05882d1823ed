"""The mathematics of training: rewards, advantages, losses. Torch only: no Megatron, no I/O."""

from real_megatron.objective.advantages import advantages, minimum_group_size
from real_megatron.objective.build import build_objective, check
from real_megatron.objective.metrics import merge, summarize
from real_megatron.objective.mismatch import mismatch_metrics
from real_megatron.objective.reinforce import ReinforceObjective
from real_megatron.objective.rewards import REWARDS, Reward, RewardOptions, find_reward, register_reward
from real_megatron.objective.sft import SupervisedObjective
from real_megatron.objective.types import (
    GroupObjective,
    MetricSums,
    NotFinite,
    Objective,
    ResponseView,
    ScoredBatch,
    Totals,
)

__all__ = [
    "REWARDS",
    "GroupObjective",
    "MetricSums",
    "NotFinite",
    "Objective",
    "ReinforceObjective",
    "ResponseView",
    "Reward",
    "RewardOptions",
    "ScoredBatch",
    "SupervisedObjective",
    "Totals",
    "advantages",
    "build_objective",
    "check",
    "find_reward",
    "merge",
    "minimum_group_size",
    "mismatch_metrics",
    "register_reward",
    "summarize",
]

"""The first steps of a run as micro-batches, before there is a response: how many, how even, how long."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import RunConfig
from real_megatron.objective import Objective
from real_megatron.planning.workload import Layout
from real_megatron.policy.plan import Planner
from real_megatron.training.preparation import Prepared
from real_megatron.training.update import mini_batches

RESPONSE_SHARES = (1.0, 0.5)
"""Lengths of the responses that stand for those to be sampled, as shares of `data.max_response_tokens`: the longest,
for which memory and time must do, and half, since judges mostly end well before the limit."""
SUPERVISED_STEPS = 3
"""Steps that are looked at in supervised training, where each has other lengths."""


@dataclass(frozen=True)
class TrialStep:
    """The micro-batches of one step, or of several."""

    about: str
    """Which steps, or what their responses are taken to be."""
    steps: int
    updates: int
    microbatches: int
    """Of one data-parallel rank; all have equally many."""
    imbalance: float
    """As of `Planner.plan`; the largest of the updates."""
    tokens: int
    """Run through the model, by all ranks."""
    longest_tokens: int
    """Of the longest micro-batch, with the padding of sequence and context parallelism."""
    longest_rows: int
    """Its rows that reach the output head."""
    groups: int
    split: int
    """Groups beyond `batch.max_tokens`."""


def trial_steps(config: RunConfig, objective: Objective, prepared: Prepared, layout: Layout) -> list[TrialStep]:
    """The first step with responses of each of `RESPONSE_SHARES`; in supervised training its first `SUPERVISED_STEPS`
    with the responses that the data has."""
    groups = prepared.data.groups
    if not config.is_rl:
        steps = min(SUPERVISED_STEPS, prepared.steps)
        batches = [[groups[i] for i in prepared.order.batch(step)] for step in range(steps)]
        return [_trial(config, objective, prepared, layout, f"steps 1 to {steps}", batches)]
    first = [groups[i] for i in prepared.order.batch(0)]
    trials = []
    for share in RESPONSE_SHARES:
        length = max(1, int(share * config.data.max_response_tokens))
        # Of other tokens each: equal responses would be run once.
        stand_ins = [Trajectory([k] * length, length - 1) for k in range(config.rollout.n)]
        batch = [replace(group, trajectories=stand_ins) for group in first]
        about = f"responses of {length:,}"
        trials.append(_trial(config, objective, prepared, layout, about, [batch]))
    return trials


def _trial(
    config: RunConfig,
    objective: Objective,
    prepared: Prepared,
    layout: Layout,
    about: str,
    batches: Sequence[list[Group]],
) -> TrialStep:
    scores = prepared.scale.tree
    planner = Planner(prepared.description, scores, config.parallel, config.batch, data_rank=0, data_size=layout.data)
    updates = [groups for batch in batches for groups in mini_batches(batch, config.batch.mini_batches)]
    plans = [planner.arrange(groups, scoring_pass=objective.needs_advantages) for groups in updates]
    everything = [mine for plan in plans for rank in plan.microbatches for mine in rank]
    packed = planner.pack(max(everything, key=lambda mine: sum(tree.total for tree in mine)))

    def total(name: str) -> int:
        return int(sum(plan.metrics[name] for plan in plans))

    return TrialStep(
        about=about,
        steps=len(batches),
        updates=len(updates),
        microbatches=total("microbatches") // layout.data,
        imbalance=max(plan.metrics["imbalance"] for plan in plans),
        tokens=total("tokens"),
        longest_tokens=packed.tokens.numel(),
        longest_rows=packed.row_positions.numel(),
        groups=sum(map(len, batches)),
        split=total("split_groups"),
    )

"""The reinforcement-learning loop: sample, score, update, hand the weights to the rollout engine."""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import torch

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.objective import (
    Objective,
    build_objective,
    check,
    minimum_group_size,
    mismatch_metrics,
    summarize,
)
from real_megatron.policy.policy import Policy
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.overlap import rollouts
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.sections import ConfigError
from real_megatron.training.examples import prompt_groups
from real_megatron.training.metrics import distinct_n
from real_megatron.training.phases import PhaseTimer
from real_megatron.training.reference import ReferenceWeights, spread
from real_megatron.training.sampler import rollout_seed
from real_megatron.training.session import Session, open_session


def train(config: RunConfig) -> None:
    """A whole run: resume or start, train, evaluate, save, export. Collective.

    Raises ConfigError or ValueError for a configuration that cannot be run, Terminated after SIGTERM.
    """
    if not config.is_rl:
        raise ConfigError(f"objective.name is {config.objective.name}: use `real-megatron sft`, or set it to real")
    check(config.objective, updates=config.batch.updates, responses=config.rollout.n)
    if config.rollout.staleness and config.objective.ratio == "none":
        raise ConfigError(
            "rollout.staleness is 1: responses come from weights one step old and need an importance ratio; "
            "set objective.ratio to truncated_is or ppo"
        )
    objective = build_objective(config.objective)
    with open_session(config, prompt_groups) as session:
        reference = ReferenceWeights(session.policy) if objective.needs_ref_logprobs else None
        session.resume()
        session.run(ReinforcementStep(session, objective, reference))


class ReinforcementStep:
    """One step of the loop: sample, annotate, update."""

    def __init__(self, session: Session, objective: Objective, reference: ReferenceWeights | None) -> None:
        self._session = session
        self._objective = objective
        self._reference = reference
        self._timer = PhaseTimer()
        self._done = session.start
        self._rollouts = rollouts(
            range(session.start, session.steps), self._generate, self._publish, session.config.rollout.staleness
        )

    def __call__(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        """See `Step`."""
        self._timer = timer
        config, policy = self._session.config, self._session.policy
        with timer.phase("rollout"):
            sampled_step, (groups, metrics) = next(self._rollouts)
            assert sampled_step == step
        if self._reference is not None:
            with timer.phase("reference"):
                groups = self._reference.annotate(groups)
        difference: dict[str, float] = {}
        if self._objective.needs_old_logprobs and config.batch.old_logprobs == "policy":
            with timer.phase("old_logprobs"):
                groups, difference = with_policy_logprobs(policy, groups)
        with timer.phase("update"):
            metrics |= update(policy, groups, self._objective, config.batch.updates) | difference
        self._done = step + 1
        return metrics

    def _publish(self) -> None:
        with self._timer.phase("sync"):
            self._session.publish(self._done)

    def _generate(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The groups of a step's prompts. With staleness 1 this runs in a thread of its own."""
        session, config = self._session, self._session.config
        batch = [session.groups[i] for i in session.sampler.batch(step)]
        prompts = [group.prompt_ids for group in batch]
        params = SamplingParams(
            n=config.rollout.n,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        seeds = [rollout_seed(config.seed, step, i) for i in range(len(prompts))]
        with session.engine_in_use:
            sampled = sample_trajectories(
                session.engine, session.tokenizer, session.scale, prompts, params, config.objective.no_anchor, seeds
            )
            if config.rollout.colocate:
                session.engine.sleep()
        groups = [replace(g, trajectories=t) for g, t in zip(batch, sampled.trajectories, strict=True)]
        smallest = minimum_group_size(config.objective.baseline, config.objective.std_normalize)
        kept = trainable(groups, smallest if config.objective.term1 else 1)
        metrics = {f"rollout/{name}": value for name, value in sampled.metrics.items()}
        metrics["rollout/small_groups"] = float(len(groups) - len(kept))
        return kept, metrics | cot_metrics(groups)


class NothingToTrain(ValueError):
    """No group of a step's rollouts can be trained on."""


def trainable(groups: Sequence[Group], smallest: int) -> list[Group]:
    """The groups with at least `smallest` responses. Raises NothingToTrain when none is left."""
    kept = [group for group in groups if len(group.trajectories) >= smallest]
    if not kept:
        raise NothingToTrain(
            f"none of the {len(groups)} prompts kept {smallest} responses with a score anchor: warm the model up with "
            "`real-megatron sft`, raise rollout.max_new_tokens, or set objective.no_anchor to penalize or force"
        )
    return kept


def with_policy_logprobs(policy: Policy, groups: Sequence[Group]) -> tuple[list[Group], dict[str, float]]:
    """The groups with the policy's own log-probs as `old_logprobs`, and the `mismatch_metrics` of the engine's."""
    scored = policy.logprobs(groups)
    annotated = [
        replace(
            group,
            trajectories=[
                replace(t, old_logprobs=spread(t, s.tokens)) for t, s in zip(group.trajectories, row, strict=True)
            ],
        )
        for group, row in zip(groups, scored, strict=True)
    ]
    engine = [
        logprob
        for group in groups
        for t in group.trajectories
        for logprob, sampled in zip(t.old_logprobs, t.loss_mask, strict=True)
        if sampled
    ]
    own = [logprob for row in scored for s in row for logprob in s.tokens]
    return annotated, summarize(mismatch_metrics(torch.tensor(own), torch.tensor(engine)))


def parts(groups: Sequence[Group], count: int) -> list[list[Group]]:
    """The groups in order, cut into `count` parts whose sizes differ by one at most; never an empty part."""
    count = min(count, len(groups))
    edges = [len(groups) * i // count for i in range(count + 1)]
    return [list(groups[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def update(policy: Policy, groups: Sequence[Group], objective: Objective, updates: int) -> dict[str, float]:
    """One optimizer update per part of the rollout batch; metrics are means (maxima: the largest) over the updates.

    Collective.
    """
    results = [policy.train_step(part, objective) for part in parts(groups, updates)]
    names = {name: None for result in results for name in result}
    metrics = {
        name: (max if name.endswith("/max") else fmean)([r[name] for r in results if name in r]) for name in names
    }
    for counted in ("tokens", "information_tokens", "model_flops", "microbatches", "split_groups"):
        metrics[counted] = sum(result[counted] for result in results)
    metrics["updates"] = float(len(results))
    return metrics


def cot_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How varied the CoTs of a batch are: distinct-n over all of them, and the share of exact copies within groups."""
    responses = [t.response_ids for group in groups for t in group.trajectories]
    copies = sum(len(group.trajectories) - len({tuple(t.response_ids) for t in group.trajectories}) for group in groups)
    metrics = {f"cot/distinct_{n}": distinct_n(responses, n) for n in (1, 2, 3)}
    metrics["cot/copies"] = copies / len(responses) if responses else math.nan
    return metrics

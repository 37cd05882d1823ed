"""The reinforcement-learning loop: publish the weights, generate, annotate, update, and what follows a step."""

from contextlib import nullcontext
from dataclasses import replace

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.objective import ReinforceObjective, build_objective, check, minimum_group_size
from real_megatron.rollout.engine import SamplingParams, naming_prompts
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.runtime import from_rank_0
from real_megatron.training.batch_order import rollout_seed
from real_megatron.training.examples import prompt_groups
from real_megatron.training.one_step_off import OneStepOff
from real_megatron.training.reference import ReferenceWeights
from real_megatron.training.rollouts import (
    cot_metrics,
    steps_without_answer,
    trainable,
    with_policy_logprobs,
    with_texts,
)
from real_megatron.training.samples import sample_rows
from real_megatron.training.session import Session, naming_step, open_session
from real_megatron.training.update import update

Batch = tuple[list[Group], dict[str, float]]
"""The groups of a step's rollouts, and metrics of how they were sampled."""


def train(config: RunConfig) -> None:
    """A whole run: resume or start, train, evaluate, save, export. Collective.

    A step's checkpoint comes before its evaluation, which may fail or take longer than a scheduler grants: the run that
    goes on from there makes up for the evaluation and the row of metrics.

    Raises ConfigError and other UserErrors for a run that cannot be done, FloatingPointError where more than
    `optimizer.max_skipped` updates in a row have a loss or gradient that is not finite (the weights are as before
    them), Terminated after SIGTERM or SIGINT.
    """
    objective = reinforcement_objective(config)
    with open_session(config, prompt_groups) as run:
        policy, timer, rank = run.policy, run.timer, run.policy.runtime.rank
        reference = ReferenceWeights(policy) if objective.needs_ref_logprobs else None
        run.resume()
        if run.finished():
            return
        if run.start < run.steps:
            run.start_engine()

        def publish(done: int) -> None:
            with timer.phase("sync"):
                run.publish(done)

        scores = run.scale.tree if objective.needs_sampled_scores else None
        unanswered = run.metrics_of_start.get("rollout/steps_without_answer", 0.0)
        ahead: OneStepOff[Batch] | None = None
        if config.rollout.staleness:
            ahead = OneStepOff(lambda step: generate(run, objective, step), publish, range(run.start, run.steps))
        with ahead or nullcontext(), run.recording() as log:
            for step in range(run.start, run.steps):
                with naming_step(step, rank):
                    # Publish and generate. One step off, both are done for the next step while this one trains.
                    with timer.phase("rollout"):
                        if ahead is None:
                            publish(step)
                            groups, metrics = generate(run, objective, step)
                        else:
                            groups, metrics = ahead.take(step)
                    unanswered = steps_without_answer(groups, unanswered, scores)
                    metrics["rollout/steps_without_answer"] = unanswered
                    # Annotate: log-probs that the objective compares with, where it needs them.
                    if reference is not None:
                        with timer.phase("reference"):
                            groups = reference.annotate(groups)
                    difference: dict[str, float] = {}
                    if objective.needs_old_logprobs and config.batch.old_logprobs == "policy":
                        with timer.phase("old_logprobs"):
                            groups, difference = with_policy_logprobs(policy, groups)
                    # Show some responses, before the update changes what the policy thinks of them.
                    if run.samples_due(step + 1):
                        with timer.phase("samples"):
                            log.samples(step + 1, sample_rows(policy, run.tokenizer, run.scale, groups, objective))
                    # Update.
                    with timer.phase("update"):
                        count = config.batch.mini_batches
                        metrics |= update(policy, groups, objective, count, step + 1) | difference
                # What follows a step: checkpoint, evaluation, metrics.
                done = step + 1
                stopping = run.stopping(done)
                if stopping or run.checkpoint_due(done):
                    with timer.phase("checkpoint"):
                        # Of rank 0, which has those of the texts: checkpoints ask for equal ones.
                        run.save(done, from_rank_0(metrics.copy))
                if run.evaluation_due(done):
                    if stopping:
                        raise run.terminated(done)
                    with timer.phase("evaluate"):
                        metrics |= run.evaluate(done)
                log.step(done, metrics, timer.finish())
                if stopping:
                    raise run.terminated(done)
        run.export()


def reinforcement_objective(config: RunConfig) -> ReinforceObjective:
    """The configured objective. Raises ConfigError for settings that cannot be trained with."""
    if not config.is_rl:
        raise ConfigError(f"objective.name is {config.objective.name}: use `real-megatron sft`, or set it to real")
    check(
        config.objective,
        mini_batches=config.batch.mini_batches,
        responses=config.rollout.n,
        aspects=len(config.scale.aspects),
    )
    if config.rollout.staleness and config.objective.ratio == "none":
        raise ConfigError(
            "rollout.staleness is 1: responses come from weights one step old and need an importance ratio; "
            "set objective.ratio to truncated_is or ppo"
        )
    if config.rollout.top_p < 1:
        raise ConfigError(
            f"rollout.top_p is {config.rollout.top_p:g}: responses outside the nucleus are never drawn, so that the "
            "gradient is that of another policy, and no objective.ratio brings them back (engines report log-probs "
            "before top-p); set rollout.top_p to 1, and rollout.temperature below 1 for less varied responses"
        )
    objective = build_objective(config.objective, config.scale.probabilities)
    assert isinstance(objective, ReinforceObjective)
    return objective


def generate(run: Session, objective: ReinforceObjective, step: int) -> Batch:
    """The groups of a step's prompts, from the weights that the engine has. One step off, in a thread of its own.

    Rank 0 alone has the metrics of how varied the texts are (`cot_metrics`).
    """
    config = run.config
    prompts = [run.groups[i] for i in run.order.batch(step)]
    params = SamplingParams(
        n=config.rollout.n,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.data.max_response_tokens,
    )
    seeds = [rollout_seed(config.seed, step, i) for i in range(len(prompts))]
    with run.engine_in_use, naming_prompts([f"data.train: {group.example_id}" for group in prompts]):
        sampled = sample_trajectories(
            run.engine,
            run.tokenizer,
            run.scale,
            [group.prompt_ids for group in prompts],
            params,
            config.objective.no_anchor,
            seeds,
            score=objective.needs_sampled_scores,
        )
        if config.rollout.colocate:
            run.engine.sleep()
    groups = [replace(g, trajectories=t) for g, t in zip(prompts, sampled.trajectories, strict=True)]
    if objective.needs_responses:
        groups = with_texts(run.tokenizer, groups)
    smallest = minimum_group_size(config.objective.baseline, config.objective.std_normalize)
    kept = trainable(groups, smallest if config.objective.term1 else 1)
    metrics = {f"rollout/{name}": value for name, value in sampled.metrics.items()}
    metrics["rollout/small_groups"] = float(len(groups) - len(kept))
    if run.policy.runtime.rank == 0:
        metrics |= cot_metrics(groups)
    return kept, metrics

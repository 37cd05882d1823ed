"""The supervised loop: SFT, RAFT and TRACT on critiques of a data set."""

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.objective import Objective, build_objective
from real_megatron.training.examples import target_groups
from real_megatron.training.session import naming_step, open_session
from real_megatron.training.update import update


def train(config: RunConfig) -> None:
    """A whole run: resume or start, train, evaluate, save, export. Collective. Errors as of `rl.train`."""
    objective = supervised_objective(config)
    with open_session(config, target_groups) as run:
        timer, rank = run.timer, run.policy.runtime.rank
        run.resume()
        if run.finished():
            return
        with run.recording() as log:
            for step in range(run.start, run.steps):
                with naming_step(step, rank), timer.phase("update"):
                    groups = [run.groups[i] for i in run.order.batch(step)]
                    metrics = update(run.policy, groups, objective, 1, step + 1)
                # What follows a step, as in rl.py.
                done = step + 1
                stopping = run.stopping(done)
                if stopping or run.checkpoint_due(done):
                    with timer.phase("checkpoint"):
                        run.save(done, metrics)
                if run.evaluation_due(done):
                    if stopping:
                        raise run.terminated(done)
                    with timer.phase("evaluate"):
                        metrics |= run.evaluate(done)
                log.step(done, metrics, timer.finish())
                if stopping:
                    raise run.terminated(done)
        run.export()


def supervised_objective(config: RunConfig) -> Objective:
    """The configured objective. Raises ConfigError for one that trains on sampled responses."""
    if config.is_rl:
        raise ConfigError(
            f"objective.name is {config.objective.name}: use `real-megatron train`, or set it to raft, tract or sft"
        )
    return build_objective(config.objective, config.scale.probabilities)

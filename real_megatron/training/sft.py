"""The supervised loop: SFT, RAFT and TRACT on given or generated CoTs."""

from dataclasses import dataclass

from real_megatron.config import RunConfig
from real_megatron.objective import Objective, build_objective
from real_megatron.sections import ConfigError
from real_megatron.training.examples import target_groups
from real_megatron.training.phases import PhaseTimer
from real_megatron.training.session import Session, open_session


def train(config: RunConfig) -> None:
    """A whole run: resume or start, train, evaluate, save, export. Collective.

    Raises ConfigError or ValueError for a configuration that cannot be run, Terminated after SIGTERM.
    """
    if config.is_rl:
        raise ConfigError(
            f"objective.name is {config.objective.name}: use `real-megatron train`, or set it to raft, tract or sft"
        )
    objective = build_objective(config.objective)
    with open_session(config, target_groups) as session:
        session.resume()
        session.run(SupervisedStep(session, objective))


@dataclass
class SupervisedStep:
    """One step of the loop: a batch of given CoTs, one update."""

    session: Session
    objective: Objective

    def __call__(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        groups = [self.session.groups[i] for i in self.session.sampler.batch(step)]
        with timer.phase("update"):
            return self.session.policy.train_step(groups, self.objective)

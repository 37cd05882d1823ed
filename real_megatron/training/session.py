"""A training run: what both loops need, built in order, and the loop around their step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError
from real_megatron.training.checkpoints import CheckpointStore
from real_megatron.training.metrics import Metrics
from real_megatron.training.phases import PhaseTimer
from real_megatron.training.resume import check_same_run
from real_megatron.training.sampler import EpochSampler
from real_megatron.training.stop import StopSignal, Terminated
from real_megatron.training.terminal import progress

logger = logging.getLogger(__name__)

Step = Callable[[int, PhaseTimer], dict[str, float]]
"""One training step (counted from 0): does its work, charging it to phases, and returns its metrics."""
Evaluate = Callable[[int], dict[str, float]]
"""Evaluates the policy as it is after that many steps, and returns its metrics."""


@dataclass
class Session:
    """The parts of a run that do not depend on the objective's kind."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    scale: ScoreScale
    policy: Policy
    sampler: EpochSampler
    steps: int
    """Steps of the whole run."""
    start: int = 0
    """Steps done before: those of the checkpoint that was resumed."""

    @property
    def is_main(self) -> bool:
        return self.policy.runtime.rank == 0

    @property
    def store(self) -> CheckpointStore:
        return CheckpointStore(self.config.output / "checkpoints", self.config.checkpoint.keep)

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one. Collective."""
        newest = self.store.newest()
        if newest is None:
            return
        step, path = newest
        if not self.config.checkpoint.resume:
            raise ConfigError(
                f"{path} exists and checkpoint.resume is false: choose another output directory, or resume"
            )
        state = self.policy.load(path)
        check_same_run(state["config"], self.config, str(path))
        self.start = state["step"]
        assert self.start == step
        logger.info("resumed from %s: %d of %d steps are done", path, self.start, self.steps)

    def save(self, step: int) -> None:
        """Write a checkpoint of the run after `step` steps. Collective."""
        state: dict[str, Any] = {"step": step, "config": self.config.model_dump(mode="json")}
        self.store.save(step, lambda directory: self.policy.save(directory, state))

    def run(self, do_step: Step, evaluate: Evaluate) -> None:
        """Do the steps that are left, with evaluations, checkpoints and metrics as configured. Collective.

        Raises:
            Terminated: SIGTERM arrived; a checkpoint of the finished step has been saved.
            FloatingPointError: loss or gradient is not finite; names the step and rank. Nothing is saved.
        """
        config, timer = self.config, PhaseTimer()
        with (
            Metrics.open(
                config.metrics, config.output, self.policy.runtime.rank, config.model_dump(mode="json"), self.start
            ) as metrics,
            StopSignal(self.policy.runtime.device) as stop,
            progress(self.is_main) as bar,
        ):
            task = bar.add_task("training", total=self.steps, completed=self.start, figures="")
            if self.start == 0 and config.evaluation.every:
                metrics.write(0, evaluate(0))
            timer.finish()
            for step in range(self.start, self.steps):
                try:
                    values = do_step(step, timer)
                except FloatingPointError as error:
                    raise FloatingPointError(f"step {step + 1}, rank {self.policy.runtime.rank}: {error}") from error
                done = step + 1
                if done == self.steps or _due(done, config.evaluation.every):
                    with timer.phase("evaluate"):
                        values |= evaluate(done)
                stopping = stop.requested()
                if done == self.steps or stopping or _due(done, config.checkpoint.every):
                    with timer.phase("checkpoint"):
                        self.save(done)
                seconds = timer.finish()
                values |= {f"seconds/{name}": value for name, value in seconds.items()}
                metrics.write(done, values)
                bar.update(task, completed=done, figures=_figures(values))
                if done == self.steps or _due(done, config.metrics.print_every):
                    logger.info("step %d/%d  %s", done, self.steps, _figures(values))
                if stopping and done < self.steps:
                    raise Terminated(f"stopped by SIGTERM after step {done}; run the same command again to go on")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _figures(values: dict[str, float]) -> str:
    """The few numbers of a step that a person watches."""
    names = ("loss", "reward", "squared_error", "valid", "grad_norm", "tokens_per_second")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)

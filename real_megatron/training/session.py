"""A training run: what both loops need, built in order, and the loop around their step."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.policy.checkpoint import read_state
from real_megatron.policy.flops import peak_flops
from real_megatron.policy.policy import Policy
from real_megatron.policy.runtime import default_dtype, host_group
from real_megatron.rollout.engine import RolloutEngine
from real_megatron.rollout.factory import build_engine, check_servers
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError
from real_megatron.training.checkpoints import CheckpointStore, mendable
from real_megatron.training.evaluating import evaluate_sets, forget_evaluations, load_evaluation_sets
from real_megatron.training.export import RUN_FILE, save_hf
from real_megatron.training.metrics import Metrics, check_sinks
from real_megatron.training.phases import PhaseTimer
from real_megatron.training.rank0 import from_rank_0
from real_megatron.training.resume import check_same_run
from real_megatron.training.sampler import EpochSampler
from real_megatron.training.serving import load_tokenizer
from real_megatron.training.stop import StopSignal, Terminated
from real_megatron.training.terminal import progress

logger = logging.getLogger(__name__)


Load = Callable[[RunConfig, PreTrainedTokenizerBase, ScoreScale], list[Group]]


class Step(Protocol):
    """What a loop does in one step."""

    def __call__(self, step: int, timer: PhaseTimer) -> dict[str, float]:
        """Do step `step` (counted from 0), charging the work to phases; returns the step's metrics."""
        ...


class Session:
    """The parts of a run that do not depend on the objective's kind. Every rank holds one; its methods are collective.

    Built in order: what fails fast comes first. `load` makes the training groups. Raises ConfigError or ValueError
    when data, scale, layout and model do not fit together.
    """

    def __init__(self, config: RunConfig, load: Load) -> None:
        self.config = config
        if not config.model.path:
            raise ConfigError("model.path is not set: name the Hugging Face checkpoint to start from")
        check_sinks(config.metrics)
        if config.is_rl or config.data.eval:
            check_servers(config.rollout, trainer=True)
        self.tokenizer = load_tokenizer(config.model.path)
        scale = config.scale
        self.scale = ScoreScale.resolve(self.tokenizer, scale.scores, scale.values, scale.anchor)
        self.groups = load(config, self.tokenizer, self.scale)
        self.evaluation_sets = load_evaluation_sets(config, self.tokenizer, self.scale)
        self.sampler = EpochSampler(len(self.groups), config.batch.prompts, config.seed)
        self.steps = self.sampler.steps_of(config.epochs) if config.epochs is not None else config.steps
        self.start = 0
        """Steps done before: those of the checkpoint that was resumed."""
        self._metrics_of_start: dict[str, float] = {}
        self.policy = Policy(config, self.scale.score_ids, self.scale.values, self.steps * config.batch.updates)
        self.store = CheckpointStore(config.output / "checkpoints", config.checkpoint.keep)
        self.engine_in_use = Lock()
        """Held while the engine generates, be it in another thread: its weights must not change then."""
        self._engine: RolloutEngine | None = None
        self._published: int | None = None

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine, started on first use; without weights until `publish`."""
        if self._engine is None:
            if self.config.rollout.colocate:  # the servers will take what is free
                self.policy.allocate_optimizer_state()
            self._engine = build_engine(
                self.config.rollout,
                Path(self.config.model.path),
                self.tokenizer,
                self.config.output / "rollout",
                device=self.policy.runtime.device,
                dtype=default_dtype(self.config.model.dtype),
                group=host_group(self.config.parallel),
            )
        return self._engine

    def publish(self, step: int) -> None:
        """Give the engine the policy's weights after `step` steps, unless an evaluation has just done so."""
        if self.config.rollout.colocate:  # the servers need the memory that this process's allocator only keeps
            torch.cuda.empty_cache()
            dist.barrier()
        if self._published != step:
            self.engine.update_weights(self.policy.export(), version=step)
            self._published = step
        if self.config.rollout.colocate:  # it sleeps while the trainer uses its GPUs; the update woke its weights alone
            self.engine.wake()

    def close(self) -> None:
        """End the engine's servers. Not collective."""
        if self._engine is not None:
            self._engine.close()

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one.

        Raises ConfigError when the checkpoint is another run's, or resuming is switched off, OSError when it is
        damaged.
        """
        newest = self.store.newest()
        if newest is None:
            return
        step, path = newest
        if not self.config.checkpoint.resume:
            raise ConfigError(f"{path} exists and checkpoint.resume is false: choose another output, or resume")
        with mendable(f"{path}: cannot be read", "remove it to resume from the checkpoint before it, if there is one"):
            state = read_state(path)
            # Before the load: another run's tensors may have other shapes, and Megatron's error would say only that.
            check_same_run(state["config"], self.config, str(path))
            self.policy.load(path)
        self.start, self._metrics_of_start = state["step"], state["metrics"]
        logger.info("resumed from %s: %d of %d steps are done", path, self.start, self.steps)

    def save(self, step: int, metrics: dict[str, float]) -> None:
        """Write a checkpoint of the run after `step` steps; `metrics` are those of the last one."""
        state: dict[str, Any] = {"step": step, "config": self.config.model_dump(mode="json"), "metrics": metrics}
        self.store.save(step, lambda directory: self.policy.save(directory, state))

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate the policy as it is after `step` steps on every evaluation set; returns `eval/NAME/METRIC`."""
        if not self.evaluation_sets:
            return {}
        config = self.config
        with self.engine_in_use:
            self.publish(step)
            results = evaluate_sets(
                config,
                self.engine,
                self.tokenizer,
                self.scale,
                self.evaluation_sets,
                config.output,
                step=step,
                about={"run": str(config.output)},
            )
            if config.rollout.colocate and not config.is_rl:  # what follows is a training step
                self.engine.sleep()
                self._published = None
        for name, result in results.items():
            logger.info("step %d, %s: %s", step, name, _agreement(result.summary()))
        return {f"eval/{set_name}/{k}": v for set_name, result in results.items() for k, v in result.summary().items()}

    def run(self, do_step: Step) -> None:
        """Do the steps that are left, with evaluations, checkpoints, metrics and the final export as configured.

        A step's checkpoint comes before its evaluation, which may fail or take longer than a scheduler grants: the run
        that goes on from there makes up for the evaluation and the row of metrics.

        Raises:
            Terminated: SIGTERM arrived; a checkpoint of the finished step has been saved.
            FloatingPointError, ValueError: log-probs, loss or gradient are not finite, or nothing can be trained on;
                names the step and rank. The weights are as before that step.
        """
        config, rank, timer = self.config, self.policy.runtime.rank, PhaseTimer()
        if self.start == self.steps and self._exported():
            logger.info("%s is finished: %s is there", config.output, self._hf)
            return
        if rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            (config.output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
            forget_evaluations(config.output, self.start)
        sinks = Metrics.open(config.metrics, config.output, rank, config.model_dump(mode="json"), self.start)
        with sinks as metrics, StopSignal(self.policy.runtime.device) as stop, progress(rank == 0) as bar:
            task = bar.add_task(config.objective.name, total=self.steps, completed=self.start, figures="")
            if self.start == 0 and config.evaluation.every:
                metrics.write(0, self.evaluate(0))
            elif self.start and from_rank_0(lambda: metrics.last_step) != self.start:
                evaluation = self.evaluate(self.start) if self._evaluates(self.start) else {}
                metrics.write(self.start, self._metrics_of_start | evaluation)
            timer.finish()
            for step in range(self.start, self.steps):
                try:
                    values = do_step(step, timer)
                except (FloatingPointError, ValueError) as error:
                    kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
                    raise kind(f"step {step + 1}, rank {rank}: {error}") from error
                done = step + 1
                last, stopping = done == self.steps, stop.requested()
                terminated = Terminated(f"stopped by SIGTERM after step {done}; run the same command again to go on")
                if last or stopping or _due(done, config.checkpoint.every):
                    with timer.phase("checkpoint"):
                        self.save(done, values)
                if self._evaluates(done):
                    if stopping and not last:
                        raise terminated
                    with timer.phase("evaluate"):
                        values |= self.evaluate(done)
                seconds = timer.finish()
                values |= {f"seconds/{name}": value for name, value in seconds.items()}
                training = seconds["step"] - seconds.get("evaluate", 0.0) - seconds.get("checkpoint", 0.0)
                values["tokens_per_second"] = values["tokens"] / training
                peak = peak_flops(self.policy.runtime.device)
                if peak is not None:  # model FLOPs utilisation of the update phase, over all GPUs
                    values["mfu"] = values["model_flops"] / seconds["update"] / (peak * self.policy.runtime.world_size)
                metrics.write(done, values)
                bar.update(task, completed=done, figures=_figures(values))
                if last or _due(done, config.metrics.print_every):
                    logger.info("step %d/%d  %s", done, self.steps, _figures(values))
                if stopping and not last:
                    raise terminated
        if config.checkpoint.save_hf:
            if rank == 0 and (self._hf / RUN_FILE).exists():  # of this run, before it was given more steps
                shutil.rmtree(self._hf)
            save_hf(self.policy, self._hf)
            logger.info("wrote %s", self._hf)

    def _evaluates(self, step: int) -> bool:
        return bool(self.evaluation_sets) and (step == self.steps or _due(step, self.config.evaluation.every))

    def _exported(self) -> bool:
        """Whether the Hugging Face checkpoint is that of the last step: not of this run before it was given more."""
        if not self._hf.exists():
            return False
        made_by = self._hf / RUN_FILE
        saved = RunConfig.from_yaml(made_by) if made_by.exists() else self.config
        return (saved.steps, saved.epochs) == (self.config.steps, self.config.epochs)

    @property
    def _hf(self) -> Path:
        return self.config.output / "hf"


@contextmanager
def open_session(config: RunConfig, load: Load) -> Iterator[Session]:
    """A session whose engine is closed at the end, however it ends."""
    session = Session(config, load)
    try:
        yield session
    finally:
        session.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _figures(values: dict[str, float]) -> str:
    """The few numbers of a step that a person watches."""
    names = ("loss", "reward", "squared_error", "valid", "grad_norm", "tokens_per_second")
    return "  ".join(f"{name} {values[name]:.4g}" for name in names if name in values)


def _agreement(summary: dict[str, float]) -> str:
    names = ("rail/pearson", "rail/spearman", "rail/kendall", "rail/mse", "sampled/pearson", "sampled/mse", "no_anchor")
    return "  ".join(f"{name} {summary[name]:.3f}" for name in names)

"""The parts of a training run that do not depend on its objective: what the loops in rl.py and sft.py are made of."""

import logging
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from real_megatron.agreement import check_ranks_agree
from real_megatron.config import RunConfig
from real_megatron.files import replace_text
from real_megatron.hf.side_files import RUN_FILE
from real_megatron.hf.staging import discard
from real_megatron.judging.evaluate import evaluate_sets, forget_evaluations
from real_megatron.judging.judge import Judge
from real_megatron.locks import only_writer
from real_megatron.policy.checkpoint import read_state
from real_megatron.policy.pending_save import PendingSave
from real_megatron.policy.policy import Policy
from real_megatron.rollout.engine import EngineSpec, RolloutEngine
from real_megatron.rollout.factory import build_engine, find_engine
from real_megatron.runtime import default_dtype, from_rank_0, host_group, join_torchrun, world_size
from real_megatron.training.best import BestCheckpoint
from real_megatron.training.checkpoints import reading
from real_megatron.training.export import save_hf, write_run
from real_megatron.training.preparation import Load, check_settings, export_directory, prepare_together
from real_megatron.training.resume import check_same_inputs, saved_inputs
from real_megatron.training.step_log import StepLog
from real_megatron.training.stop import StopSignal, Terminated
from real_megatron.training.timer import PhaseTimer
from real_megatron.training.watchdog import watching

logger = logging.getLogger(__name__)


class Session:
    """A run: its data, policy, engine and checkpoints. Every rank holds one; its methods are collective.

    Built in order: what fails fast comes first. Settings, output and layout are checked before ranks meet, data is read
    before the model, once on each host. `load` makes the training groups. The rollout engine is started by
    `start_engine`, at the latest by the first evaluation. No other run can use the output directory until `close`.
    Raises ConfigError, DataError or CheckpointError when data, scale, layout and model do not fit together, the output
    directory holds another run, or another uses it.
    """

    def __init__(self, config: RunConfig, load: Load) -> None:
        settings = check_settings(config, world_size())
        join_torchrun(config.parallel.timeout_minutes)
        check_ranks_agree(config)  # before data is read by the configuration of one of them
        prepared, self.inputs = prepare_together(config, settings, load)
        self.config = config
        self.store = prepared.store
        self.model_dir = prepared.model_dir
        self.tokenizer = prepared.tokenizer
        self.scale = prepared.scale
        self.groups = prepared.data.groups
        self.evaluation_sets = prepared.evaluation_sets
        self.order = prepared.order
        self.steps = prepared.steps
        self.start = 0
        """Steps done before: those of the checkpoint that was resumed."""
        self.metrics_of_start: dict[str, float] = {}
        """Metrics of the last of those steps."""
        self.best = BestCheckpoint(self.store, config.checkpoint.best)
        with ExitStack() as held:
            from_rank_0(lambda: self._take_output(held))
            check_ranks_agree(config, self.inputs)  # hosts may have copies of the files
            self.policy = Policy(
                config, self.scale.tree, self.scale.values, prepared.updates, self.model_dir, self.scale.aspects
            )
            self._lock = held.pop_all()
        self.stop = StopSignal(self.policy.runtime.device)
        self._stopped_by = 0
        self.timer = PhaseTimer()
        self.engine_in_use = Lock()
        """Held while the engine generates, possibly in another thread: its weights must not change then."""
        self._engine: RolloutEngine | None = None
        self._published: int | None = None

    def _take_output(self, held: ExitStack) -> None:
        self._check_in_place = held.enter_context(only_writer(self.config.output, inside=True))

    def check_output(self) -> None:
        """Raise Vanished where the output directory was removed or renamed since the start: a file there would be of a
        run that nobody finds, or of a second one's. Collective."""
        from_rank_0(lambda: self._check_in_place())

    # --- the engine -------------------------------------------------------------------------------------------------

    def start_engine(self) -> None:
        """Start the rollout engine, without weights until `publish`."""
        config = self.config
        if config.rollout.colocate:  # the servers will take what is free
            self.policy.allocate_optimizer_state()
            self._free_cached_memory()
        spec = EngineSpec(
            config=config.rollout,
            model_dir=self.model_dir,
            tokenizer=self.tokenizer,
            work_dir=config.output / "rollout",
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_response_tokens=config.data.max_response_tokens,
            device=self.policy.runtime.device,
            dtype=default_dtype(config.model.dtype),
            fp32_logits=config.model.fp32_logits,
        )
        # An engine that draws first weights would else take numbers that the run before a resume has not taken here.
        with torch.random.fork_rng([spec.device] if spec.device.type == "cuda" else []):
            self._engine = build_engine(spec, host_group(config.parallel.timeout_minutes))

    @property
    def engine(self) -> RolloutEngine:
        """The rollout engine. `start_engine` must have started it."""
        assert self._engine is not None, "start_engine() has not been called"
        return self._engine

    def publish(self, step: int) -> None:
        """Give the engine the policy's weights after `step` steps, unless an evaluation has just done so."""
        if self.config.rollout.colocate:
            self._free_cached_memory()
        if self._published != step:
            # In front of servers rank 0 alone has an engine.
            everywhere = find_engine(self.config.rollout.engine).on_every_rank
            self.engine.update_weights(self.policy.export(everywhere), version=step)
            self._published = step
        if self.config.rollout.colocate:  # it sleeps while the trainer uses its GPUs; the sync woke its weights alone
            self.engine.wake()

    def _free_cached_memory(self) -> None:
        """Colocated servers need the memory that the trainers' allocators only keep."""
        torch.cuda.empty_cache()
        dist.barrier()

    def close(self) -> None:
        """End the engine's servers, requests that are under way, and the writing of a checkpoint that nobody has waited
        for; another run may use the output. Not collective."""
        with self._lock:
            self.store.give_up()
            if self._engine is not None:
                self._engine.close()

    # --- before the first step --------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one. Of those before it, what `checkpoint.keep`
        leaves stays: the start before this one may have been killed between a save and the removal behind it.

        Raises ConfigError when the checkpoint was trained with other data or another model, OSError when it is damaged.
        """
        self.store.clear()
        newest = self.store.newest()
        if newest is None:
            return
        step, path = newest
        with reading(path):
            state = read_state(path)
            check_same_inputs(saved_inputs(state, str(path)), self.inputs, self.config, str(path))
            self.policy.load(path)
        from_rank_0(self.store.prune)
        self.start, self.metrics_of_start = state["step"], state["metrics"]
        logger.info("resumed from %s: %d of %d steps are done", path, self.start, self.steps)

    def finished(self) -> bool:
        """Whether all steps are done and exported; says so."""
        if self.start < self.steps or not self._exported():
            return False
        from_rank_0(self._unlock_export)
        logger.info("%s is finished: %s is there", self.config.output, self._hf)
        self.best.say(self.config)
        return True

    @contextmanager
    def recording(self) -> Iterator[StepLog]:
        """Listen for SIGTERM and SIGINT, and keep the metrics of the steps to come. Begins with the evaluation before
        the first step, or with the row and the evaluation that the start before this one has not come to; there is
        nothing to save then, and a signal ends the run at once."""
        config, rank = self.config, self.policy.runtime.rank
        if rank == 0:
            config.output.mkdir(parents=True, exist_ok=True)
            replace_text(config.output / "config.yaml", config.to_yaml())
            forget_evaluations(config.output, self.start)
        with StepLog(config, self.policy.runtime, self.start, self.steps) as log:
            if self.start == 0 and config.evaluation.every:
                log.row(0, self.evaluate(0))
            elif self.start and log.last_step() != self.start:
                evaluation = self.evaluate(self.start) if self.evaluation_due(self.start) else {}
                log.row(self.start, self.metrics_of_start | evaluation)
            self.timer.finish()
            with self.stop:
                yield log

    # --- after a step -----------------------------------------------------------------------------------------------

    def stopping(self, done: int) -> bool:
        """Whether the run has to end after `done` steps, though not all are done: a rank has received SIGTERM or
        SIGINT. Publishes a checkpoint that all ranks have written by now."""
        self.store.settle(wait=False)
        self._stopped_by = self.stop.requested()
        return bool(self._stopped_by) and done < self.steps

    def terminated(self, done: int) -> Terminated:
        """The error that ends a run which has been asked to stop and has saved its checkpoint."""
        name = signal.Signals(self._stopped_by).name
        return Terminated(f"stopped by {name} after step {done}; run the same command again to go on", self._stopped_by)

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint belongs after `done` steps: every `checkpoint.every` steps, at the end, and where an
        evaluation may find it to be the best."""
        settings = self.config.checkpoint
        return done == self.steps or _due(done, settings.every) or (bool(settings.best) and self.evaluation_due(done))

    def save(self, done: int, metrics: dict[str, float]) -> None:
        """Write a checkpoint of the run after `done` steps; `metrics` are those of the last one. With
        `checkpoint.asynchronous` it is only begun, but where the run ends."""
        state: dict[str, Any] = {
            "step": done,
            "config": self.config.model_dump(mode="json"),
            "inputs": self.inputs,
            # A number of numpy, which a checkpoint could not be read with, may be one of them.
            "metrics": {name: float(value) for name, value in metrics.items()},
        }

        def describe(directory: Path) -> None:
            if self.policy.runtime.rank == 0:  # for `convert to-hf`, which reads tensors alone
                write_run(self.config, directory)

        def write(directory: Path) -> None:
            self.policy.save(directory, state)
            describe(directory)

        def begin(directory: Path) -> PendingSave:
            pending = self.policy.begin_save(directory, state)
            describe(directory)
            return pending

        self.check_output()
        if self.config.checkpoint.asynchronous and done < self.steps and not self._stopped_by:
            self.store.begin(done, begin)
        else:
            self.store.save(done, write)

    def samples_due(self, done: int) -> bool:
        """Whether some responses of the step that makes `done` steps are shown: every `metrics.samples_every` steps."""
        return _due(done, self.config.metrics.samples_every)

    def evaluation_due(self, done: int) -> bool:
        """Whether an evaluation belongs after `done` steps: every `evaluation.every` steps, and at the end."""
        return bool(self.evaluation_sets) and (done == self.steps or _due(done, self.config.evaluation.every))

    def evaluate(self, done: int) -> dict[str, float]:
        """Evaluate the policy as it is after `done` steps on every evaluation set; returns `eval/NAME/METRIC`.

        Starts the engine where the steps need none (SFT): before the first evaluation, not before the first step, since
        servers or a second model would take memory that the steps can use.
        """
        if not self.evaluation_sets:
            return {}
        self.check_output()
        if self._engine is None:
            self.start_engine()
        config = self.config
        with self.engine_in_use:
            self.publish(done)
            judge = Judge(self.engine, self.tokenizer, self.scale, config)
            about = {"run": str(config.output)}
            results = evaluate_sets(judge, self.evaluation_sets, config.output, step=done, about=about)
            if config.rollout.colocate and not config.is_rl:  # what follows is a training step
                self.engine.sleep()
                self._published = None
        for name, result in results.items():
            logger.info("step %d, %s: %s", done, name, _agreement(result.summary()))
        found = {f"eval/{name}/{k}": v for name, result in results.items() for k, v in result.summary().items()}
        if config.checkpoint.best:
            self.store.settle()
        self.best.see(done, found)
        return found

    def export(self) -> None:
        """Write the Hugging Face checkpoint of the finished run, if `checkpoint.save_hf`; say which checkpoint is the
        best."""
        self.best.say(self.config)
        if not self.config.checkpoint.save_hf:
            return
        self.check_output()
        if self.policy.runtime.rank == 0 and (self._hf / RUN_FILE).exists():
            discard(self._hf)  # of this run, before it was given more steps
        save_hf(self.policy, self._hf)
        logger.info("wrote %s", self._hf)

    def _unlock_export(self) -> None:
        """Remove the side file of its lock, which a kill right behind the export has left."""
        with only_writer(self._hf):
            pass

    def _exported(self) -> bool:
        """Whether the Hugging Face checkpoint is that of the last step: not of this run before it was given more."""
        made_by = self._hf / RUN_FILE
        if not made_by.exists():
            return False
        saved = RunConfig.from_yaml(made_by)
        return (saved.steps, saved.epochs) == (self.config.steps, self.config.epochs)

    @property
    def _hf(self) -> Path:
        return export_directory(self.config)


@contextmanager
def open_session(config: RunConfig, load: Load) -> Iterator[Session]:
    """A session whose engine is closed at the end, however it ends, and which ends where it is stuck."""
    session = Session(config, load)
    try:
        with watching(config.output, config.parallel.stuck_minutes):
            yield session
    finally:
        session.close()


@contextmanager
def naming_step(step: int, rank: int) -> Iterator[None]:
    """Add the step (counted from 0 here, from 1 in the message) and the rank to any error."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at step {step + 1}, rank {rank}")
        raise


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agreement(summary: dict[str, float]) -> str:
    names = ("rail/pearson", "rail/spearman", "rail/kendall", "rail/mse", "sampled/pearson", "sampled/mse", "no_anchor")
    return "  ".join(f"{name} {summary[name]:.3f}" for name in names)

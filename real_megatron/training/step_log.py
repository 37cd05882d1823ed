"""What a run shows and leaves of its steps: metric sinks, log lines, a progress bar."""

import logging
from types import TracebackType
from typing import Any, Self

from real_megatron.config import RunConfig
from real_megatron.policy.flops import peak_flops
from real_megatron.policy.parallel_groups import Runtime
from real_megatron.runtime import from_rank_0
from real_megatron.terminal import progress
from real_megatron.training.metrics import MetricSinks
from real_megatron.training.step_faults import StepFaults

logger = logging.getLogger(__name__)


class StepLog:
    """The metrics of a run of `steps` steps, of which `start` are done. Only rank 0 writes and shows."""

    def __init__(self, config: RunConfig, runtime: Runtime, start: int, steps: int) -> None:
        self._config = config
        self._runtime = runtime
        self._steps = steps
        self._faults = StepFaults()
        self._sinks = MetricSinks.open(
            config.metrics, config.output, runtime.rank, config.model_dump(mode="json"), start
        )
        self._bar = progress(runtime.rank == 0)
        self._task = self._bar.add_task(config.objective.name, total=steps, completed=start, figures="")

    def last_step(self) -> int | None:
        """The step of the last row that stands in metrics.jsonl. Collective."""
        return from_rank_0(lambda: self._sinks.last_step)

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write a row of metrics as it is."""
        from_rank_0(lambda: self._sinks.write(step, values))

    def samples(self, done: int, rows: list[dict[str, Any]]) -> None:
        """Write some responses of a training step (`sample_rows`), where there are any."""
        from_rank_0(lambda: self._sinks.samples(done, rows) if rows else None)

    def step(self, done: int, values: dict[str, float], seconds: dict[str, float]) -> None:
        """Write the row of a training step and show it.

        seconds: of each phase of the step, `PhaseTimer.finish`. Adds tokens per second and, on GPUs whose peak is
        known, the model FLOPs utilisation of the update phase over all GPUs.
        """
        values = values | {f"seconds/{name}": value for name, value in seconds.items()}
        training = seconds["step"] - seconds.get("evaluate", 0.0) - seconds.get("checkpoint", 0.0)
        values["tokens_per_second"] = values["tokens"] / training
        peak = peak_flops(self._runtime.device)
        if peak is not None:
            values["mfu"] = values["model_flops"] / seconds["update"] / (peak * self._runtime.world_size)
        from_rank_0(lambda: self._sinks.write(done, values))
        if self._runtime.rank:
            return
        figures = "  ".join([*map(str.upper, self._faults.see(done, values)), _figures(values)])
        self._bar.update(self._task, completed=done, figures=figures)
        every = self._config.metrics.print_every
        if done == self._steps or (every > 0 and done % every == 0):
            logger.info("step %d/%d  %s", done, self._steps, figures)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._sinks.close()


def _figures(values: dict[str, float]) -> str:
    """The few numbers of a step that a person watches."""
    names = ("loss", "reward", "squared_error", "valid", "grad_norm", "tokens_per_second")
    skipped = ("skipped_updates",) if values.get("skipped_updates") else ()
    return "  ".join(f"{name} {values[name]:.4g}" for name in (*skipped, *names) if name in values)

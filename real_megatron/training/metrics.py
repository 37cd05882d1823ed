"""Metric sinks: metrics.jsonl and samples.jsonl always, TensorBoard by default, wandb when configured."""

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from real_megatron.config import MetricsConfig
from real_megatron.errors import ConfigError


class Sink(Protocol):
    """Takes one row of numbers per step, and for some steps responses, one row each (`sample_rows`)."""

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file of one JSON object a line, each with a `step`. Flushed line by line, so that a killed run keeps its rows.

    A resumed run first drops the rows after the step it resumes from: they will come again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self.last_step: int | None = None
        """The step of the last row, of an earlier start or of this one."""
        self._path = path
        self._file: TextIO | None = None  # made with its first row
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines() if resume_step else []
            kept = [line for line in lines if _step_of(line) <= resume_step]
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(fresh, path)
            self.last_step = int(_step_of(kept[-1])) if kept else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        # JSON has no NaN: null says that the number does not exist.
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        self.last_step = step

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class JsonlSink:
    """metrics.jsonl, a row a step, and samples.jsonl, a row a response; resumed, each step is in them once."""

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        self._metrics = JsonLines(directory / "metrics.jsonl", resume_step)
        self._samples = JsonLines(directory / "samples.jsonl", resume_step)

    @property
    def last_step(self) -> int | None:
        """The step of the last row of metrics."""
        return self._metrics.last_step

    def write(self, step: int, values: dict[str, float]) -> None:
        self._metrics.write(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._samples.write(step, row)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class TensorBoardSink:
    """TensorBoard event files; what an earlier start of the run wrote for later steps is not shown."""

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._writer.add_text("samples", "\n\n".join(map(_markdown, rows)), step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A wandb run, named after the output directory; a resumed run continues it, one from the start begins another,
    since wandb takes no steps below its last."""

    def __init__(self, project: str, directory: Path, config: dict[str, Any], resume_step: int = 0) -> None:
        import wandb

        marker = directory / "wandb-id"
        run_id = marker.read_text(encoding="utf-8").strip() if resume_step and marker.exists() else None
        self._run = wandb.init(
            project=project, name=directory.name, dir=str(directory), config=config, id=run_id, resume="allow"
        )
        marker.write_text(self._run.id, encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        import wandb

        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_sinks(config: MetricsConfig) -> None:
    """Raise ConfigError when the package of a configured sink is missing: before a model is loaded for nothing."""
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "metrics.wandb_project is set, but wandb is not installed: pip install wandb, or unset the key"
        )


class MetricSinks:
    """All configured sinks. Ranks other than 0 write nothing."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks

    @classmethod
    def open(
        cls, config: MetricsConfig, output: Path, rank: int, run_config: dict[str, Any], resume_step: int = 0
    ) -> Self:
        if rank:
            return cls([])
        output.mkdir(parents=True, exist_ok=True)
        sinks: list[Sink] = [JsonlSink(output, resume_step)]
        if config.tensorboard:
            sinks.append(TensorBoardSink(output / "tensorboard", resume_step))
        if config.wandb_project:
            sinks.append(WandbSink(config.wandb_project, output, run_config, resume_step))
        return cls(sinks)

    @property
    def last_step(self) -> int | None:
        """The step of the last row of metrics.jsonl; None without one, and on ranks that write none."""
        return next((sink.last_step for sink in self._sinks if isinstance(sink, JsonlSink)), None)

    def write(self, step: int, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for sink in self._sinks:
            sink.samples(step, rows)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def distinct_n(texts: Iterable[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of the token sequences (Li et al. 2016, distinct-n); NaN if none.

    Near 1: every CoT is different. Falling: the CoTs become copies of each other or repeat themselves.
    """
    seen: set[tuple[int, ...]] = set()
    total = 0
    for ids in texts:
        for start in range(len(ids) - n + 1):
            seen.add(tuple(ids[start : start + n]))
            total += 1
    return len(seen) / total if total else math.nan


def _markdown(row: dict[str, Any]) -> str:
    """A response for TensorBoard. Its texts are indented, as code, so that nothing in them is taken for markup."""
    texts = ("prompt", "response")
    head = ", ".join(f"{name} `{value}`" for name, value in row.items() if name not in texts)
    blocks = ["\n".join(f"    {line}" for line in row[name].splitlines()) for name in texts]
    return "\n\n".join([head, "prompt", blocks[0], "response", blocks[1]])


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut short by a crash

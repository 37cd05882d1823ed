"""Metric sinks: metrics.jsonl and samples.jsonl always, TensorBoard by default, wandb when configured."""

import importlib.util
import io
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from real_megatron.config import MetricsConfig
from real_megatron.errors import ConfigError
from real_megatron.files import append, check_in_place, replace_text, writing

_LARGEST = np.iinfo(np.int64).max


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
        self.path = path
        self.last_step: int | None = None
        """The step of the last row, of an earlier start or of this one."""
        self._file: int | None = None
        """Its descriptor, without a buffer that could be written later; made with its first row."""
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines() if resume_step else []
            kept = [line for line in lines if _step_of(line) <= resume_step]
            replace_text(path, "".join(line + "\n" for line in kept))
            self.last_step = int(_step_of(kept[-1])) if kept else None

    def write(self, step: int, row: dict[str, Any]) -> None:
        # JSON has no NaN: null says that the number does not exist.
        row = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
        self.check_in_place()
        with writing(self.path):
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            append(self._file, (json.dumps({"step": step, **row}) + "\n").encode())
        self.last_step = step

    def check_in_place(self) -> None:
        """Raise Vanished where the file was removed or renamed since its first row."""
        if self._file is not None:
            check_in_place(self.path, self._file)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


class JsonlSink:
    """metrics.jsonl, a row a step, and samples.jsonl, a row a response; resumed, each step is in them once."""

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        self._metrics = JsonLines(directory / "metrics.jsonl", resume_step)
        self._samples = JsonLines(directory / "samples.jsonl", resume_step)

    @property
    def last_step(self) -> int | None:
        """The step of the last row of metrics."""
        return self._metrics.last_step

    def check_in_place(self) -> None:
        """Raise Vanished where what has been written so far was removed or renamed."""
        self._metrics.check_in_place()
        self._samples.check_in_place()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._metrics.write(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._samples.write(step, row)

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


class TensorBoardSink:
    """TensorBoard event files; what an earlier start of the run wrote from step `begin` on is not shown."""

    def __init__(self, directory: Path, begin: int = 0) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # TensorBoard reads files in the order of their names, which begin with the second that they were made in. The
        # clock may have been set back since the last start.
        with writing(directory):
            directory.mkdir(exist_ok=True)
            before = [int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*")]
            second = max([int(time.time()), *(number + 1 for number in before)])
            name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
            self._path = directory / name
            # Not torch's SummaryWriter, whose thread would meet a full disk first, and say so in its own way.
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._add(Event(step=begin, file_version="brain.Event:2"))
        self._add(Event(step=begin, session_log=SessionLog(status=SessionLog.START)))

    def _add(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        with writing(self._path):
            append(self._file, records.getvalue())

    def write(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        self._add(*(Event(step=step, summary=scalar(name, value)) for name, value in values.items()))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import text

        self._add(Event(step=step, summary=text("samples", "\n\n".join(map(_markdown, rows)))))

    def close(self) -> None:
        os.close(self._file)


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
        replace_text(marker, self._run.id)

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
    """All configured sinks. Ranks other than 0 write nothing.

    metrics.jsonl comes last: a row that stands there is in all of them, wherever the run was killed. The row of the
    step that the run resumes from, where it does not stand there, is written again.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._lines = next((sink for sink in sinks if isinstance(sink, JsonlSink)), None)

    @classmethod
    def open(
        cls, config: MetricsConfig, output: Path, rank: int, run_config: dict[str, Any], resume_step: int = 0
    ) -> Self:
        if rank:
            return cls([])
        output.mkdir(parents=True, exist_ok=True)
        lines = JsonlSink(output, resume_step)
        sinks: list[Sink] = []
        if config.tensorboard:
            whole = bool(resume_step) and lines.last_step == resume_step
            sinks.append(TensorBoardSink(output / "tensorboard", resume_step + whole))
        if config.wandb_project:
            sinks.append(WandbSink(config.wandb_project, output, run_config, resume_step))
        return cls([*sinks, lines])

    @property
    def last_step(self) -> int | None:
        """The step of the last row of metrics.jsonl; None without one, and on ranks that write none."""
        return None if self._lines is None else self._lines.last_step

    def write(self, step: int, values: dict[str, float]) -> None:
        self._check_in_place()
        for sink in self._sinks:
            sink.write(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._check_in_place()
        for sink in self._sinks:
            sink.samples(step, rows)

    def _check_in_place(self) -> None:
        if self._lines is not None:
            self._lines.check_in_place()

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def distinct_n(texts: Iterable[ArrayLike], n: int) -> float:
    """Share of different n-grams among all n-grams of the token sequences (Li et al. 2016, distinct-n); NaN if none.

    texts: token ids, from 0 to 2**31 - 1, of each

    Near 1: every CoT is different. Falling: the CoTs become copies of each other or repeat themselves.
    """
    arrays = [np.asarray(ids, np.int64) for ids in texts]
    ids = np.concatenate([np.empty(0, np.int64), *arrays])
    lengths = np.array([len(array) for array in arrays], np.int64)
    # Of every position, how many tokens its text has from there on.
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(ids))
    starts = np.flatnonzero(left >= n)
    if not len(starts):
        return math.nan
    # Each n-gram as one number, which two different ones never share: the number of its first n - 1 tokens among those
    # that occur, and the last token, as digits.
    base = int(ids.max()) + 1
    grams = ids[starts]
    for offset in range(1, n):
        if int(grams.max()) >= _LARGEST // base:
            grams = np.unique(grams, return_inverse=True)[1]
        grams = grams * base + ids[starts + offset]
    grams.sort()  # some ten times as fast as np.unique, which puts them into a hash table
    return (1 + int(np.count_nonzero(grams[1:] != grams[:-1]))) / len(grams)


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

"""Metric sinks: rows survive a crash and a resume, other ranks are silent, missing packages are named."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from real_megatron.config import MetricsConfig
from real_megatron.errors import ConfigError
from real_megatron.training.metrics import JsonlSink, MetricSinks, TensorBoardSink, check_sinks, distinct_n


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_before_the_run_ends_and_what_is_no_number_is_null(tmp_path: Path) -> None:
    """JSON has neither NaN nor infinity."""
    sink = JsonlSink(tmp_path)
    sink.write(1, {"loss": 0.5, "kl": math.nan, "ratio": math.inf, "reward": -math.inf})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "kl": None, "ratio": None, "reward": None}]


def test_a_resumed_run_drops_the_rows_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(tmp_path)
    for step in (1, 2, 3):
        sink.write(step, {"loss": float(step)})
        sink.samples(step, [{"id": id, "reward": None} for id in "ab"])
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    sink = JsonlSink(tmp_path, resume_step=2)
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 1, 2, 2]
    sink.samples(3, [{"id": "c", "reward": 0.5}])
    assert rows(tmp_path / "samples.jsonl")[4:] == [{"step": 3, "id": "c", "reward": 0.5}]
    sink.write(3, {"loss": 30.0})
    assert rows(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_a_run_from_the_start_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonlSink(tmp_path).write(1, {"loss": 2.0})
    assert rows(path) == [{"step": 1, "loss": 2.0}]


def test_what_is_switched_off_is_not_written(tmp_path: Path) -> None:
    with MetricSinks.open(MetricsConfig(tensorboard=False), tmp_path, rank=0, run_config={}) as metrics:
        metrics.write(3, {"loss": 1.0})
        assert metrics.last_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    with MetricSinks.open(MetricsConfig(), tmp_path / "out", rank=1, run_config={}) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.samples(1, [{"id": "a"}])
    assert not (tmp_path / "out").exists()


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricSinks.open(MetricsConfig(), tmp_path, rank=0, run_config={}) as metrics:
        metrics.write(1, {"train/loss": 0.25})
        metrics.samples(1, [{"id": "a", "prompt": "# Why?\n<b>", "response": "So.", "reward": -0.5}])
        metrics.write(2, {"train/loss": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5)]
    (text,) = events.Tensors("samples/text_summary")
    shown = "id `a`, reward `-0.5`\n\nprompt\n\n    # Why?\n    <b>\n\nresponse\n\n    So."
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (1, shown)


def test_tensorboard_does_not_show_what_a_resumed_or_restarted_run_writes_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps, value in ((0, (0, 1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        with MetricSinks.open(MetricsConfig(), tmp_path, 0, {}, resume_step) as metrics:
            for step in steps:
                metrics.write(step, {"loss": value})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
    with MetricSinks.open(MetricsConfig(), tmp_path, 0, {}) as metrics:
        metrics.write(1, {"loss": 3.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 3)]


def test_wandb_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        check_sinks(MetricsConfig(wandb_project="p"))
    check_sinks(MetricsConfig())


def test_wandb_continues_a_resumed_run_and_begins_another_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb cannot be reached in tests: what it is asked for is recorded."""
    asked: list[dict[str, object]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[str] = []

    def init(**options: object) -> SimpleNamespace:
        asked.append(options)
        run = f"run{len(asked)}"
        log = lambda values, step: logged.append((step, values))  # noqa: E731
        return SimpleNamespace(id=run, log=log, finish=lambda: finished.append(run))

    table = lambda columns, data: (columns, data)  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=table))
    for resume_step in (0, 2, 0):
        with MetricSinks.open(MetricsConfig(wandb_project="p"), tmp_path, 0, {"seed": 4}, resume_step) as metrics:
            metrics.write(resume_step + 1, {"loss": 1.5})
    assert [options.pop("id") for options in asked] == [None, "run1", None]
    about = {"project": "p", "name": tmp_path.name, "dir": str(tmp_path), "config": {"seed": 4}, "resume": "allow"}
    assert asked == [about] * 3
    assert logged == [(1, {"loss": 1.5}), (3, {"loss": 1.5}), (1, {"loss": 1.5})]
    assert finished == ["run1", "run2", "run3"]
    with MetricSinks.open(MetricsConfig(wandb_project="p"), tmp_path, 0, {}) as metrics:
        metrics.samples(4, [{"prompt": id, "response": id, "reward": 0.5} for id in "ab"])
    columns = ["prompt", "response", "reward"]
    assert logged[3] == (4, {"samples": (columns, [["a", "a", 0.5], ["b", "b", 0.5]])})


def test_distinct_n() -> None:
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_n([[1, 1, 1, 1]], 1) == 1 / 4
    assert type(distinct_n([[1, 2]], 1)) is float  # not of numpy: checkpoints hold it, and are read without its types
    assert math.isnan(distinct_n([[1]], 2)) and math.isnan(distinct_n([], 1)) and math.isnan(distinct_n([[], []], 1))


@pytest.mark.parametrize("largest", [3, 150_000, 2**31 - 1])
def test_distinct_n_counts_as_a_set_of_tuples_does(largest: int) -> None:
    """Ids as of vocabularies, and such that an n-gram's number does not fit 64 bits."""
    rng = random.Random(largest)
    few = [rng.randrange(largest) for _ in range(4)] + [largest]
    texts = [rng.choices(few, k=rng.randrange(12)) for _ in range(40)]
    for n in (1, 2, 3, 5):
        grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
        assert distinct_n(texts, n) == len(set(grams)) / len(grams)


def test_a_row_that_the_run_was_killed_in_is_whole_in_tensorboard_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """metrics.jsonl comes last; and the clock has been set back between the starts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sample = {"id": "a", "prompt": "p", "response": "r"}
    for resume_step, cut, clock in ((0, True, 2e9), (1, False, 1e9), (1, False, 1.5e9)):
        with monkeypatch.context() as patch:
            patch.setattr("real_megatron.training.metrics.time.time", lambda clock=clock: clock)
            with MetricSinks.open(MetricsConfig(), tmp_path, 0, {}, resume_step) as metrics:
                if not resume_step:
                    metrics.write(0, {"a": 0.0, "b": 0.0})
                    metrics.samples(1, [sample])
                if cut:
                    real = TensorBoardSink.write

                    def die(sink: TensorBoardSink, step: int, values: dict[str, float], real: Any = real) -> None:
                        real(sink, step, {"a": values["a"]})
                        raise KeyboardInterrupt

                    patch.setattr(TensorBoardSink, "write", die)
                    with pytest.raises(KeyboardInterrupt):
                        metrics.write(1, {"a": 1.0, "b": 1.0})
                elif metrics.last_step == 0:
                    metrics.write(1, {"a": 1.0, "b": 1.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in "ab":
        assert [(e.step, e.value) for e in events.Scalars(name)] == [(0, 0), (1, 1)]
    assert [e.step for e in events.Tensors("samples/text_summary")] == [1]

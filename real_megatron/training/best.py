"""The best checkpoint of a run, by one metric of its evaluations (`checkpoint.best`)."""

import difflib
import json
import logging
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.evaluation.metrics import LOWER_IS_BETTER
from real_megatron.evaluation.result import DECODINGS
from real_megatron.evaluation.weighted import NAMES, WITHIN
from real_megatron.files import replace_text
from real_megatron.runtime import from_rank_0, rank
from real_megatron.training.checkpoints import CheckpointStore

logger = logging.getLogger(__name__)

FILE = "best.json"
"""In the directory of the checkpoints: `metric`, `step` and `value` of the best one."""


def check_best(config: RunConfig) -> None:
    """Raise ConfigError where `checkpoint.best` names no metric that the run's evaluations will have."""
    metric = config.checkpoint.best
    if not metric:
        return
    if not config.data.eval:
        raise ConfigError(f"checkpoint.best is {metric}, but data.eval is empty: name a test set, or leave best empty")
    if not config.evaluation.every:
        raise ConfigError(
            f"checkpoint.best is {metric}, but evaluation.every is 0, so that the run evaluates at its end alone and "
            "has nothing to compare: set evaluation.every, or leave best empty"
        )
    known = [
        f"{name}/{decoding}/{kind}"
        for name, source in config.data.eval.items()
        for decoding in DECODINGS
        for kind in (*NAMES, *(WITHIN if source.within else ()))
    ]
    if metric not in known:
        nearest = difflib.get_close_matches(metric.removeprefix("eval/"), known, n=1, cutoff=0)[0]
        raise ConfigError(
            f"checkpoint.best: {metric!r} is no metric of this run's evaluations (NAME/DECODING/METRIC, as in "
            f"docs/reading_a_run.md); did you mean {nearest}?"
        )


class BestCheckpoint:
    """Which checkpoint of `store` is the best by `metric`; it stays, however old it is. No metric: none is.

    A checkpoint is written before its evaluation, which decides; the record `FILE` is replaced as a whole, and its
    checkpoint is there. So a run that was killed anywhere decides what it would have decided. Of equal values the
    earliest is the best; NaN never is.
    """

    def __init__(self, store: CheckpointStore, metric: str) -> None:
        self._store, self._metric = store, metric
        if metric and rank() == 0:
            self._hold()

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Decide about the checkpoint of `step`, whose evaluation gave `values` (`eval/NAME/DECODING/METRIC`); nothing
        where there is none, as before the first step. Collective."""
        if self._metric:
            from_rank_0(lambda: self._see(step, values[f"eval/{self._metric}"]))

    def say(self, config: RunConfig) -> None:
        """Log which it is, and how to make a Hugging Face checkpoint of it. By rank 0."""
        if not self._metric or rank() != 0:
            return
        found = self._read()
        if found is None:
            logger.warning("no checkpoint is the best: no evaluation has a number for %s", self._metric)
            return
        step, value = found
        command = ["real-megatron", "convert", "to-hf", str(self._store.path(step)), str(config.output / "hf-best")]
        command += ["--hf", config.model.path]
        command += ["--revision", config.model.revision] if config.model.revision else []
        command += ["--family", config.model.family] if config.model.family != "auto" else []
        logger.info("best by %s: step %d (%.6g); for Hugging Face: %s", self._metric, step, value, shlex.join(command))

    def _see(self, step: int, value: float) -> None:
        if not math.isfinite(value) or not self._store.path(step).is_dir():
            return
        best = self._read()
        sign = -1.0 if self._metric.rpartition("/")[2] in LOWER_IS_BETTER else 1.0
        if best is None or sign * value > sign * best[1]:
            replace_text(self._file, json.dumps({"metric": self._metric, "step": step, "value": value}) + "\n")
        self._hold()
        self._store.prune()

    def _hold(self) -> None:
        found = self._read()
        self._store.held = None if found is None else found[0]

    def _read(self) -> tuple[int, float] | None:
        """Step and value; None where nothing is recorded, by this metric, of a checkpoint that is there."""
        if not self._file.exists():
            return None
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            metric, step, value = found["metric"], int(found["step"]), float(found["value"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is no record of the best checkpoint: the next evaluation makes a new one", self._file)
            return None
        return (step, value) if metric == self._metric and self._store.path(step).is_dir() else None

    @property
    def _file(self) -> Path:
        return self._store.directory / FILE

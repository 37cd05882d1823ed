"""The result of judging a test set: predictions, metrics, and the files that hold them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from real_megatron.errors import DataError
from real_megatron.evaluation.metrics import Estimate
from real_megatron.files import replace_text

DECODINGS = ("rail", "sampled")


@dataclass(frozen=True)
class Prediction:
    """What the judge says about one example: means over its critiques that have a score; None if none has."""

    id: str
    label: float
    rail: float | None
    """Expected score."""
    sampled: float | None
    """Score drawn from the distribution; with several critiques the mean of one draw each."""
    probabilities: list[float] | None
    """Score distribution π(k) over the whole vocabulary, in the scale's order; None of the mean of several aspects."""
    critiques: list[str]
    cluster: str | None = None
    """Predictions of one cluster are resampled together; None: by itself."""
    within: str | None = None
    """The group within which correlation is computed too."""


def clusters_of(predictions: Sequence[Prediction]) -> list[tuple[str | None, str]]:
    """The cluster of each prediction: what it names, or it alone."""
    return [(None, p.id) if p.cluster is None else (p.cluster, "") for p in predictions]


def groups_of(predictions: Sequence[Prediction]) -> list[str | None] | None:
    """The group of each prediction within which correlation is computed too; None where the test set has none."""
    groups = [p.within for p in predictions]
    return None if all(group is None for group in groups) else groups


@dataclass
class Evaluation:
    """One judge on one test set."""

    name: str
    """The test set."""
    metrics: dict[str, dict[str, Estimate]]
    """Decoding (`rail`, `sampled`) → metric → estimate."""
    counts: dict[str, int]
    """`examples`, `responses`; of the responses: `no_anchor` (of which `truncated` by length), `forced`; `unanswered`:
    examples without any score, which no metric covers. Of the test set's prompts beyond the length limit:
    `prompts_dropped`, `prompts_cut`; absent where the caller chose the prompts."""
    means: dict[str, float]
    """Over the responses: `response_tokens`; over those with a score: `score_mass`, `score_entropy` (nats)."""
    config: dict[str, Any]
    """Everything that the numbers depend on."""
    step: int | None = None
    """Of the training, during which the judge was evaluated."""
    predictions: list[Prediction] = field(default_factory=list)
    """One per example."""
    aspects: list["Evaluation"] = field(default_factory=list)
    """Where the scale has aspects the same of each, as `NAME.ASPECT`, over the examples with a label of it; its files
    are its own."""

    def summary(self) -> dict[str, float]:
        """Flat numbers for metric sinks: `rail/pearson`, `sampled/mse`, …; the shares of responses `no_anchor`,
        `truncated` and `forced`, and of examples `unanswered`; means."""
        values = {f"{decoding}/{name}": e.value for decoding, row in self.metrics.items() for name, e in row.items()}
        for kind in ("no_anchor", "truncated", "forced"):
            values[kind] = self.counts[kind] / max(1, self.counts["responses"])
        values["unanswered"] = self.counts["unanswered"] / max(1, self.counts["examples"])
        return values | self.means

    def save(self, path: Path) -> None:
        """Write `path` (JSON, indented; NaN as null) and the predictions beside it, in `predictions_path(path)`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.predictions)
        replace_text(predictions_path(path), rows)
        fields = {
            "name": self.name,
            "step": self.step,
            "metrics": {d: {name: asdict(e) for name, e in row.items()} for d, row in self.metrics.items()},
            "counts": self.counts,
            "means": self.means,
            "config": self.config,
        }
        replace_text(path, json.dumps(_without_nan(fields), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises DataError, naming the file, for anything else, or where a file is missing."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            metrics = {
                decoding: {name: Estimate(**_with_nan(e)) for name, e in row.items()}
                for decoding, row in fields["metrics"].items()
            }
            # Not splitlines(): critiques may hold other line separators, such as U+2028.
            with predictions_path(path).open(encoding="utf-8") as lines:
                predictions = [Prediction(**json.loads(line)) for line in lines]
            return cls(
                fields["name"],
                metrics,
                fields["counts"],
                _with_nan(fields["means"]),
                fields["config"],
                fields["step"],
                predictions,
            )
        except FileNotFoundError as error:
            raise DataError(f"{path}: {error.filename} is missing; evaluate again, or remove {path.name}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise DataError(
                f"{path}: not a saved evaluation ({type(error).__name__}: {error}); evaluate again"
            ) from error


def predictions_path(path: Path) -> Path:
    """Where the predictions of the evaluation `path` are: `NAME.json` → `NAME.predictions.jsonl`."""
    return path.with_suffix(".predictions.jsonl")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in fields.items()}

"""Evaluate a judge on labelled examples, and keep the result as files."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, Self

from transformers import PreTrainedTokenizerBase

from real_megatron.evaluation.metrics import NAMES, Estimate, agreement
from real_megatron.evaluation.reading import NoAnchorRule, Probabilities, Reading, read
from real_megatron.rollout.engine import RolloutEngine, SamplingParams
from real_megatron.scores import ScoreScale

DECODINGS = ("rail", "sampled")


class LabelledPrompt(Protocol):
    """An example as evaluation needs it."""

    @property
    def id(self) -> str: ...

    @property
    def label(self) -> float: ...

    @property
    def prompt_ids(self) -> list[int]: ...


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
    """Score distribution π(k) over the whole vocabulary, in the scale's order."""
    critiques: list[str]


@dataclass
class Evaluation:
    """One judge on one test set."""

    name: str
    """The test set."""
    metrics: dict[str, dict[str, Estimate]]
    """Decoding (`rail`, `sampled`) → metric → estimate."""
    counts: dict[str, int]
    """`examples`, `responses`; of the responses: `no_anchor` (of which `truncated` by length), `forced`; `unanswered`:
    examples without any score, which no metric covers."""
    means: dict[str, float]
    """Over the responses: `response_tokens`; over those with a score: `score_mass`, `score_entropy` (nats)."""
    config: dict[str, Any]
    """Everything that the numbers depend on."""
    step: int | None = None
    predictions: list[Prediction] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Flat numbers for metric sinks: `rail/pearson`, `sampled/mse`, …, `no_anchor` (share), means."""
        values = {f"{decoding}/{name}": e.value for decoding, row in self.metrics.items() for name, e in row.items()}
        return values | {"no_anchor": self.counts["no_anchor"] / max(1, self.counts["responses"])} | self.means

    def save(self, path: Path) -> None:
        """Write `path` (JSON, indented; NaN as null) and the predictions beside it, in `predictions_path(path)`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in self.predictions)
        _replace(predictions_path(path), rows)
        fields = {
            "name": self.name,
            "step": self.step,
            "metrics": {d: {name: asdict(e) for name, e in row.items()} for d, row in self.metrics.items()},
            "counts": self.counts,
            "means": self.means,
            "config": self.config,
        }
        _replace(path, json.dumps(_without_nan(fields), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ValueError, naming the file, for anything else, or where a file is missing."""
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
            raise ValueError(f"{path}: {error.filename} is missing; evaluate again, or remove {path.name}") from error
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: not a saved evaluation ({type(error).__name__}: {error}); evaluate again"
            ) from error


def predictions_path(path: Path) -> Path:
    """Where the predictions of the evaluation `path` are: `NAME.json` → `NAME.predictions.jsonl`."""
    return path.with_suffix(".predictions.jsonl")


def evaluate(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    examples: Sequence[LabelledPrompt],
    params: SamplingParams,
    *,
    name: str,
    seed: int = 0,
    rule: NoAnchorRule = "force",
    probabilities: Probabilities = "full",
    bootstrap: int = 1000,
    batch: int = 256,
    step: int | None = None,
    config: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge every example with `params.n` critiques and compare with the labels.

    RAIL and sampled decoding read the same critiques. `rule`: a critique without an anchor gets one appended (`force`,
    the default: every example is judged) or is left out (`drop`: an example that loses all of them is counted as
    `unanswered`, and no metric covers it; where none is answered, every metric is NaN, with a note). `config` (the
    model's path, the command, …) is kept with the result; `on_progress` is called with the number of examples done.
    Every rank of a distributed engine must call it; all get the same result.

    Raises ValueError when there is no example, or an id occurs twice.
    """
    if not examples:
        raise ValueError(f"test set {name}: no examples to evaluate on")
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        twin = next(id for i, id in enumerate(ids) if id in ids[:i])
        raise ValueError(f"test set {name}: the id {twin!r} occurs twice; give every example its own")
    rows: list[list[Reading]] = []
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        prompts = [example.prompt_ids for example in part]
        rows += read(
            engine,
            tokenizer,
            scale,
            prompts,
            ids[start : start + batch],
            params=params,
            seed=seed,
            rule=rule,
            probabilities=probabilities,
        )
        if on_progress is not None:
            on_progress(len(rows))
    predictions = [_prediction(example, row) for example, row in zip(examples, rows, strict=True)]
    answered = [p for p in predictions if p.rail is not None]
    readings = [reading for row in rows for reading in row]
    settings = {
        "samples": params.n,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
        "seed": seed,
        "no_anchor_rule": rule,
        "probabilities": probabilities,
        "bootstrap": bootstrap,
        "scale": {"scores": scale.texts, "values": scale.values, "anchor": scale.anchor_text},
    }
    return Evaluation(
        name=name,
        metrics={decoding: _agreement(answered, decoding, scale, bootstrap, seed) for decoding in DECODINGS},
        counts=_counts(readings, len(examples), len(examples) - len(answered)),
        means=_means(readings),
        config=dict(config or {}) | settings,
        step=step,
        predictions=predictions,
    )


def _agreement(
    answered: Sequence[Prediction], decoding: str, scale: ScoreScale, bootstrap: int, seed: int
) -> dict[str, Estimate]:
    if not answered:
        note = f"no response has the anchor {scale.anchor_text!r}"
        return {name: Estimate(math.nan, math.nan, math.nan, note) for name in NAMES}
    values = [getattr(p, decoding) for p in answered]
    return agreement(values, [p.label for p in answered], scale.values, bootstrap, seed)


def _prediction(example: LabelledPrompt, readings: Sequence[Reading]) -> Prediction:
    scored = [r for r in readings if r.probabilities is not None]
    critiques = [r.critique for r in readings]
    if not scored:
        return Prediction(example.id, example.label, None, None, None, critiques)
    return Prediction(
        example.id,
        example.label,
        fmean(r.expected for r in scored),
        fmean(r.sampled for r in scored),
        mean_distribution(scored),
        critiques,
    )


def mean_distribution(readings: Sequence[Reading]) -> list[float]:
    """The score distribution averaged over readings that all have one."""
    return [fmean(column) for column in zip(*(r.probabilities for r in readings), strict=True)]


def _counts(readings: Sequence[Reading], examples: int, unanswered: int) -> dict[str, int]:
    return {
        "examples": examples,
        "unanswered": unanswered,
        "responses": len(readings),
        "no_anchor": sum(r.no_anchor for r in readings),
        "truncated": sum(r.truncated for r in readings),
        "forced": sum(r.no_anchor and r.probabilities is not None for r in readings),
    }


def _means(readings: Sequence[Reading]) -> dict[str, float]:
    distributions = [r.probabilities for r in readings if r.probabilities is not None]
    return {
        "response_tokens": fmean(r.tokens for r in readings),
        "score_mass": fmean(map(sum, distributions)) if distributions else math.nan,
        "score_entropy": fmean(map(_entropy, distributions)) if distributions else math.nan,
    }


def _entropy(probabilities: Sequence[float]) -> float:
    mass = sum(probabilities)
    return -sum(p / mass * math.log(p / mass) for p in probabilities if p) if mass else math.nan


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in fields.items()}

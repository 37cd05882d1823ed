"""A judge on labelled test sets: each example is judged, and the scores are compared with the labels."""

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from real_megatron.agreement import check_ranks_agree
from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompts, label_column, load_examples
from real_megatron.data.lazy import LazySequence
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import ConfigError, DataError
from real_megatron.evaluation.metrics import Estimate, agreement
from real_megatron.evaluation.report import evaluation_path, how_answered
from real_megatron.evaluation.result import DECODINGS, Evaluation, Prediction, clusters_of, groups_of
from real_megatron.evaluation.weighted import NAMES
from real_megatron.hf.output import check_output
from real_megatron.judging.job import weights_written
from real_megatron.judging.judge import Judge
from real_megatron.judging.kept import KeptReadings
from real_megatron.judging.reading import Answer, Reading, answers_of, mean_answer, weighted_answer
from real_megatron.locks import hold
from real_megatron.rollout.engine import naming_prompts
from real_megatron.runtime import from_rank_0, join_torchrun, once_a_host, rank
from real_megatron.scores import ScoreScale

logger = logging.getLogger(__name__)

CLUSTER = "group"
"""The column whose rows of one value are a cluster, where the test set names none."""


@dataclass(frozen=True)
class EvaluationPrompt:
    """A labelled prompt as tokens."""

    id: str
    label: float
    prompt_ids: list[int]
    cluster: str | None = None
    """Examples of one cluster are resampled together; None: by itself."""
    within: str | None = None
    """The group within which correlation is computed too."""
    labels: tuple[float | None, ...] = ()
    """Where the scale has aspects the label of each, None where there is none."""


class StoredPrompts(LazySequence[EvaluationPrompt]):
    """Prompts in a file that the ranks of a host share (`StoredGroups`)."""

    def __init__(self, prompts: Iterable[EvaluationPrompt]) -> None:
        self._groups = StoredGroups.of(
            Group(
                prompt.prompt_ids,
                [],
                prompt.label,
                prompt.id,
                {"columns": [prompt.cluster, prompt.within]},
                prompt.labels,
            )
            for prompt in prompts
        )

    def __len__(self) -> int:
        return len(self._groups)

    def _make(self, index: int) -> EvaluationPrompt:
        group = self._groups[index]
        cluster, within = group.meta["columns"]
        return EvaluationPrompt(group.example_id, group.label, group.prompt_ids, cluster, within, group.labels)


@dataclass(frozen=True)
class EvaluationSet:
    """The prompts of a test set, and what became of those beyond `data.max_prompt_tokens`."""

    prompts: Sequence[EvaluationPrompt]
    dropped: int = 0
    cut: int = 0


def evaluate(
    config: RunConfig,
    model: str | Path | None = None,
    output: Path | None = None,
    *,
    revision: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate a checkpoint on the sets of `data.eval`; saves `output/evaluation/NAME.json`, returns the results.

    model: a directory, or a name on the hub (with `revision`: a branch, tag or commit); default: the run's own,
        `config.output/hf`
    output: default: `config.output`
    on_progress: called with a set's name, its examples done and all its examples

    Each batch of `evaluation.batch_size` examples is kept in `output/evaluation/NAME.partial.jsonl` until its set is
    complete, so that the same call goes on where an evaluation was stopped. Under torchrun the ranks share the
    examples; every rank gets the numbers, rank 0 alone the predictions (`Evaluation.predictions` is empty on the
    others). How many critiques were cut, or got an anchor appended, and how many examples have no score, is logged at
    the end.

    Raises ConfigError when there is no test set, or another evaluation writes the same file (`only_writer`),
    CheckpointError when there is no checkpoint.
    """
    model, output = model or config.output / "hf", output or config.output
    if not config.data.eval:
        raise ConfigError("data.eval is empty: name at least one test set, for example data.eval.dev.path=dev.jsonl")
    check_output(output / "evaluation", "output")
    join_torchrun(config.parallel.timeout_minutes)
    check_ranks_agree(config)
    work_dir = output / "rollout"
    with ExitStack() as held:
        for name in config.data.eval:
            from_rank_0(partial(hold, held, evaluation_path(output, name)))
        judge = held.enter_context(
            Judge.from_pretrained(model, revision=revision, config=config, work_dir=work_dir, start=False)
        )
        sets = once_a_host(lambda: load_evaluation_sets(config, judge.tokenizer, judge.scale))
        results = evaluate_sets(judge, sets, output, about={"model": judge.name}, keep=True, on_progress=on_progress)
    for name, result in results.items() if rank() == 0 else ():
        seen = any(result.counts[kind] for kind in ("no_anchor", "unanswered"))
        logger.log(logging.WARNING if seen else logging.INFO, "%s: %s", name, how_answered(result))
    return results


def load_evaluation_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale
) -> dict[str, EvaluationSet]:
    """Every set of `data.eval`; too long prompts are dropped or cut (`data.long_prompts`) and counted. Raises
    ConfigError when none is left."""
    data = config.data
    sets = {}
    for name, source in data.eval.items():
        keys = source.cluster or CLUSTER, source.within
        keep = [key for key in (source.cluster, source.within) if key]
        examples = load_examples(source, data.template, scale.values, keep, critiques=False, aspects=scale.aspects)
        encoded = encode_prompts(tokenizer, examples, data)
        if not encoded.kept:
            raise ConfigError(
                f"data.eval.{name}: no prompt of {source.path} is short enough: raise data.max_prompt_tokens, or "
                "set data.long_prompts=cut_left"
            )
        prompts = StoredPrompts(_prompt(example, ids, *keys) for example, ids in encoded.kept)
        sets[name] = EvaluationSet(prompts, encoded.dropped, encoded.cut)
    return sets


def _prompt(example: JudgeExample, ids: list[int], cluster: str, within: str | None) -> EvaluationPrompt:
    meta, labels = example.meta, example.labels
    return EvaluationPrompt(example.id, example.label, ids, _text(meta, cluster), _text(meta, within), labels)


def evaluate_sets(
    judge: Judge,
    sets: Mapping[str, EvaluationSet],
    directory: Path,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
    keep: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Judge every set; rank 0 saves each result in `directory` (see `evaluation_path`). Collective: results as of
    `evaluate_set`. Where the scale has aspects there is one more result for each, `NAME.ASPECT`.

    about: what else the numbers depend on, such as the model's path; kept with the results, as is the column that a
        set of `data.eval` has its labels from (`label_column`; null where the format's reader decides).
    keep: keep the readings of a set that is not complete, and use those that are there
    """
    results: dict[str, Evaluation] = {}
    for name, test_set in sets.items():
        source = judge.config.data.eval.get(name)
        labels = {} if source is None else {"label_column": label_column(source)}
        if on_progress is not None:
            on_progress(name, 0, len(test_set.prompts))
        kept = _kept(judge, test_set, evaluation_path(directory, name, step)) if keep else None
        found = evaluate_set(
            judge,
            test_set.prompts,
            name,
            step=step,
            about={**(about or {}), **labels},
            on_progress=on_progress and partial(_tell, on_progress, name, len(test_set.prompts)),
            kept=kept,
        )
        for one in (found, *found.aspects):
            one.counts |= {"prompts_dropped": test_set.dropped, "prompts_cut": test_set.cut}
            from_rank_0(lambda one=one: one.save(evaluation_path(directory, one.name, step)))  # type: ignore[misc]
            results[one.name] = one
        if kept is not None:
            kept.end()
    return results


def _tell(on_progress: Callable[[str, int, int], None], name: str, total: int, done: int) -> None:
    on_progress(name, done, total)


def _kept(judge: Judge, test_set: EvaluationSet, result: Path) -> KeptReadings | None:
    """Of rank 0, which alone keeps readings."""
    if rank() != 0:
        return None
    written = None if judge.directory is None else weights_written(judge.directory)
    prompts = [[prompt.id, prompt.prompt_ids] for prompt in test_set.prompts]
    about = {**judge_settings(judge), "model": judge.name, "weights_written": written, "prompts": prompts}
    return KeptReadings(result.with_suffix(".partial.jsonl"), about)


def evaluate_set(
    judge: Judge,
    examples: Sequence[EvaluationPrompt],
    name: str,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
    kept: KeptReadings | None = None,
) -> Evaluation:
    """Judge every example with `evaluation.samples` critiques and compare with the labels.

    RAIL and sampled decoding read the same critiques. A critique without an anchor gets one appended
    (`evaluation.no_anchor: force`, the default: every example is judged) or is left out (`drop`: an example that loses
    all of them is counted as `unanswered`, and no metric covers it; where none is answered, every metric is NaN, with a
    note). `about` is kept with the result; `on_progress` is called with the number of examples done; `kept`, of rank 0,
    has the readings of an earlier call and takes those of this one. Collective: readings come to rank 0, which computes
    metrics, counts and means. Every rank returns these; predictions stay with rank 0, and the others return none.
    Where the scale has aspects, an example's score and label are means by weight over the aspects that have a label.

    Raises DataError when there is no example, an id occurs twice, or the engine cannot take a prompt.
    """
    if not examples:
        raise DataError(f"test set {name}: no examples to evaluate on")
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        repeated = next(id for i, id in enumerate(ids) if id in ids[:i])
        raise DataError(f"test set {name}: the id {repeated!r} occurs twice; give every example its own")
    settings = judge.config.evaluation
    rows: list[list[Reading]] = []
    """Of rank 0, which alone gets readings."""

    def begin() -> int:
        rows.extend([] if kept is None else kept.begin())
        return len(rows)

    done = from_rank_0(begin)
    if rows:
        logger.info("test set %s: goes on behind %d of %d examples", name, done, len(examples))
    for start in range(done, len(examples), settings.batch_size):
        chunk = examples[start : start + settings.batch_size]
        with naming_prompts([f"test set {name}: {example.id}" for example in chunk]):
            rows += judge.read([example.prompt_ids for example in chunk], [example.id for example in chunk])
        if kept is not None:
            kept.add(rows[start:])
        if on_progress is not None:
            on_progress(start + len(chunk))
    config = dict(about or {}) | {"bootstrap": settings.bootstrap, **_grouping(judge, name, examples)}
    overall = _evaluation(judge, name, examples, rows, None, step, config)
    # Aspects that no example has a label of have no result.
    labelled = [
        a for a in range(len(judge.scale.aspects)) if any(example.labels[a] is not None for example in examples)
    ]
    overall.aspects = [_evaluation(judge, name, examples, rows, a, step, config) for a in labelled]
    return overall


def _evaluation(
    judge: Judge,
    name: str,
    examples: Sequence[EvaluationPrompt],
    rows: Sequence[Sequence[Reading]],
    aspect: int | None,
    step: int | None,
    config: Mapping[str, Any],
) -> Evaluation:
    """The readings, of rank 0, beside the labels: those of one aspect, or None: of the scale, or of all its aspects."""
    chosen = [k for k, example in enumerate(examples) if aspect is None or example.labels[aspect] is not None]
    own = [rows[k] for k in chosen] if rank() == 0 else []
    scale = judge.scale
    predictions = [_prediction(scale, examples[k], row, aspect) for k, row in zip(chosen, own, strict=rank() == 0)]
    part = None if aspect is None else scale.aspects[aspect]
    values = sorted(set(scale.values)) if part is None and scale.aspects else (part or scale.parts[0]).values
    # The resamples take the processors of a whole host: one rank is enough.
    metrics, counts, means = from_rank_0(lambda: _numbers(judge, own, predictions, values, aspect))
    settings = judge_settings(judge)
    if part is not None:
        settings["scale"] = {"scores": part.texts, "values": values, "anchor": scale.anchor_text, "aspect": part.name}
    elif scale.aspects:
        settings["scale"] = {"values": values, "anchor": scale.anchor_text, "aspects": settings["scale"]["aspects"]}
    return Evaluation(
        name=name if part is None else f"{name}.{part.name}",
        metrics=metrics,
        counts=counts,
        means=means,
        config={**settings, **config},
        step=step,
        predictions=predictions,
    )


def _numbers(
    judge: Judge,
    rows: Sequence[Sequence[Reading]],
    predictions: Sequence[Prediction],
    values: Sequence[float],
    aspect: int | None,
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int], dict[str, float]]:
    """Metrics, counts and means of the readings of every example."""
    answered = [p for p in predictions if p.rail is not None]
    readings = [reading for row in rows for reading in row]
    metrics = {decoding: _agreement(judge, answered, decoding, values) for decoding in DECODINGS}
    return metrics, _counts(readings, len(rows), len(rows) - len(answered)), _means(readings, aspect)


def judge_settings(judge: Judge) -> dict[str, Any]:
    """What a judge's numbers depend on beside the model, as plain data to keep with them."""
    config, params, scale = judge.config, judge.params(), judge.scale
    return {
        "samples": params.n,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": params.max_new_tokens,
        "seed": config.seed,
        "no_anchor_rule": config.evaluation.no_anchor,
        "probabilities": config.scale.probabilities,
        "scale": {"scores": scale.texts, "values": scale.values, "anchor": scale.anchor_text, **_aspects(scale)},
    }


def _aspects(scale: ScoreScale) -> dict[str, Any]:
    return {"aspects": {aspect.name: aspect.weight for aspect in scale.aspects}} if scale.aspects else {}


def forget_evaluations(directory: Path, step: int) -> None:
    """Remove the saved evaluations of later steps than `step`: a run that starts there will make them again, perhaps at
    other steps, and a report would take the old ones for its newest."""
    for path in (directory / "evaluation").glob("*-step-*.json*"):
        found = re.search(r"-step-(\d+)(\.json|\.predictions\.jsonl)(\.tmp)?$", path.name)
        if found and int(found[1]) > step:
            path.unlink()


def _text(meta: Mapping[str, Any], key: str | None) -> str | None:
    return None if key is None or meta.get(key) is None else str(meta[key])


def _grouping(judge: Judge, name: str, examples: Sequence[EvaluationPrompt]) -> dict[str, str | None]:
    """The columns that the examples' clusters and groups are from; None where each is by itself, or there are none."""
    source = judge.config.data.eval.get(name)
    cluster = (source and source.cluster) or CLUSTER
    within = (source and source.within) or "group"
    return {
        "cluster": cluster if any(example.cluster is not None for example in examples) else None,
        "within": within if any(example.within is not None for example in examples) else None,
    }


def _agreement(
    judge: Judge, answered: Sequence[Prediction], decoding: str, scale_values: Sequence[float]
) -> dict[str, Estimate]:
    if not answered:
        note = f"no response has the anchor {judge.scale.anchor_text!r}"
        return {name: Estimate(math.nan, math.nan, math.nan, note) for name in NAMES}
    values = [getattr(p, decoding) for p in answered]
    labels = [p.label for p in answered]
    settings = judge.config.evaluation.bootstrap, judge.config.seed
    return agreement(values, labels, scale_values, *settings, clusters_of(answered), groups_of(answered))


def _prediction(
    scale: ScoreScale, example: EvaluationPrompt, readings: Sequence[Reading], aspect: int | None
) -> Prediction:
    answer, label = mean_answer(answers_of(readings)), example.label
    if aspect is not None:
        answer = None if answer is None else answer.aspects[aspect]
        label = example.labels[aspect] or 0.0
    elif answer is not None and scale.aspects:
        labelled = [own if y is not None else None for own, y in zip(answer.aspects, example.labels, strict=True)]
        answer = weighted_answer(scale.aspects, labelled)
    return Prediction(
        example.id,
        label,
        None if answer is None else answer.expected,
        None if answer is None else answer.sampled,
        None if answer is None or not answer.probabilities else answer.probabilities,
        [reading.critique for reading in readings],
        example.cluster,
        example.within,
    )


def _counts(readings: Sequence[Reading], examples: int, unanswered: int) -> dict[str, int]:
    return {
        "examples": examples,
        "unanswered": unanswered,
        "responses": len(readings),
        "no_anchor": sum(r.no_anchor for r in readings),
        "truncated": sum(r.truncated for r in readings),
        "forced": sum(r.no_anchor and r.answer is not None for r in readings),
    }


def _means(readings: Sequence[Reading], aspect: int | None) -> dict[str, float]:
    answers = answers_of(readings)
    if aspect is not None:
        answers = [answer.aspects[aspect] for answer in answers]
    return {
        "response_tokens": fmean(r.tokens for r in readings),
        "score_mass": fmean(answer.mass for answer in answers) if answers else math.nan,
        "score_entropy": fmean(map(_entropy, answers)) if answers else math.nan,
    }


def _entropy(answer: Answer) -> float:
    """Of the distribution, renormalised; of several aspects the mean."""
    if answer.aspects:
        return fmean(map(_entropy, answer.aspects))
    mass = answer.mass
    return -sum(p / mass * math.log(p / mass) for p in answer.probabilities if p) if mass else math.nan

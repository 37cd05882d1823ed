"""Evaluation sets of a configuration: prepared once, judged by whatever engine serves the weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.data import encode_prompts, load_examples
from real_megatron.evaluation.report import evaluation_path
from real_megatron.evaluation.runner import Evaluation, evaluate
from real_megatron.rollout.engine import RolloutEngine, SamplingParams
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError


@dataclass(frozen=True)
class EvaluationPrompt:
    """A labelled prompt as tokens."""

    id: str
    label: float
    prompt_ids: list[int]


def load_evaluation_sets(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale
) -> dict[str, list[EvaluationPrompt]]:
    """Every set of `data.eval`; too long prompts are dropped and counted. Raises ConfigError when none is left."""
    limit, data = config.rollout.max_prompt_tokens, config.data
    sets = {}
    for name, source in data.eval.items():
        examples = load_examples(source, data.template, scale.values)
        kept = encode_prompts(tokenizer, examples, limit, data.chat_template)
        if not kept:
            raise ConfigError(
                f"data.eval.{name}: no prompt of {source.path} is short enough: raise rollout.max_prompt_tokens"
            )
        sets[name] = [EvaluationPrompt(example.id, example.label, ids) for example, ids in kept]
    return sets


def forget_evaluations(directory: Path, step: int) -> None:
    """Remove the saved evaluations of later steps than `step`: a run that starts there will make them again, perhaps at
    other steps, and a report would take the old ones for its newest."""
    for path in (directory / "evaluation").glob("*-step-*.json*"):
        found = re.search(r"-step-(\d+)(\.json|\.predictions\.jsonl)$", path.name)
        if found and int(found[1]) > step:
            path.unlink()


def evaluation_params(config: RunConfig) -> SamplingParams:
    """How evaluation and judging sample CoTs."""
    return SamplingParams(
        n=config.evaluation.samples,
        temperature=config.evaluation.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def evaluate_sets(
    config: RunConfig,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    sets: Mapping[str, list[EvaluationPrompt]],
    directory: Path,
    *,
    step: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Evaluation]:
    """Judge every set; rank 0 saves each result in `directory` (see `evaluation_path`). Collective.

    about: what else the numbers depend on, such as the model's path; kept with the results.
    """
    results = {}
    for name, prompts in sets.items():
        results[name] = evaluate(
            engine,
            tokenizer,
            scale,
            prompts,
            evaluation_params(config),
            name=name,
            seed=config.seed,
            rule=config.evaluation.no_anchor,
            probabilities=config.objective.probabilities,
            bootstrap=config.evaluation.bootstrap,
            batch=config.rollout.batch_size,
            step=step,
            config=about,
        )
        if not dist.is_initialized() or dist.get_rank() == 0:
            results[name].save(evaluation_path(directory, name, step))
    return results

"""Evaluating and judging with a checkpoint as it is: no policy, only a rollout engine that serves it."""

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from real_megatron.config import RunConfig
from real_megatron.data import encode_prompt, example_from_record, load_template
from real_megatron.evaluation.judge import JudgeSummary, judge
from real_megatron.evaluation.metrics import NAMES, Estimate
from real_megatron.evaluation.report import cell
from real_megatron.evaluation.runner import DECODINGS, Evaluation
from real_megatron.policy.runtime import start_process_group
from real_megatron.sections import ConfigError
from real_megatron.training.evaluating import evaluate_sets, evaluation_params, load_evaluation_sets
from real_megatron.training.serving import served
from real_megatron.training.terminal import progress


def evaluate_checkpoint(config: RunConfig, model: Path, output: Path) -> Table:
    """Evaluate a checkpoint on the sets of `data.eval`; saves `output/evaluation/NAME.json`, returns a table to print.

    Under torchrun the ranks share the examples, and every rank gets the table. Raises ConfigError when there is no set
    or no checkpoint.
    """
    if not config.data.eval:
        raise ConfigError("data.eval is empty: name at least one test set, for example data.eval.dev.path=dev.jsonl")
    if _world_size() > 1 and not dist.is_initialized():
        start_process_group(config.parallel)
    with served(config, model, output / "rollout") as judge_model:
        tokenizer, scale = judge_model.tokenizer, judge_model.scale
        sets = load_evaluation_sets(config, tokenizer, scale)
        about = {"model": str(model)}
        return _table(evaluate_sets(config, judge_model.engine, tokenizer, scale, sets, output, about=about))


def judge_file(config: RunConfig, model: Path, source: Path, output: Path) -> JudgeSummary:
    """Score every row of the JSONL file `source`; resumable, and bad rows are reported beside `output`.

    Raises ConfigError when the output was begun with other settings, OSError when a file cannot be read.
    """
    if _world_size() > 1:
        raise ConfigError("judge runs as one process: start it without torchrun; servers take several GPUs")
    template = load_template(config.data.template)
    with source.open("rb") as lines:
        total = sum(1 for line in lines if line.strip())
    with served(config, model, output.parent / "rollout") as judge_model, progress(True) as bar:
        tokenizer, limit = judge_model.tokenizer, config.rollout.max_prompt_tokens

        def encode(record: dict[str, Any]) -> list[int]:
            example = example_from_record(record, template, "row", "row")
            ids = encode_prompt(tokenizer, example, config.data.chat_template)
            if len(ids) > limit:
                raise ValueError(f"the prompt has {len(ids)} tokens, more than rollout.max_prompt_tokens = {limit}")
            return ids

        task = bar.add_task("judging", total=total, figures="")
        return judge(
            judge_model.engine,
            tokenizer,
            judge_model.scale,
            source,
            output,
            encode,
            evaluation_params(config),
            seed=config.seed,
            rule=config.evaluation.no_anchor,
            probabilities=config.objective.probabilities,
            batch=config.rollout.batch_size,
            settings={
                "model": str(model),
                "weights_written": _written(model),
                "template": config.data.template,
                "template_digest": hashlib.blake2b(template.text.encode(), digest_size=8).hexdigest(),
                "chat_template": config.data.chat_template,
            },
            on_progress=lambda done: bar.update(task, completed=done.judged + done.skipped + done.bad),
        )


def _table(results: dict[str, Evaluation]) -> Table:
    table = Table("test set", "decoding", *NAMES)
    for name, result in results.items():
        for decoding in DECODINGS:
            table.add_row(name, decoding, *(_noted(result.metrics[decoding][metric]) for metric in NAMES))
    return table


def _noted(estimate: Estimate) -> str:
    return f"{cell(estimate)} ({estimate.note})" if estimate.note else cell(estimate)


def _world_size() -> int:
    formed = dist.get_world_size() if dist.is_initialized() else 1
    return max(formed, int(os.environ.get("WORLD_SIZE", "1")))  # torchrun's, before its world is formed


def _written(model: Path) -> str | None:
    """When the newest weights of a checkpoint were written: those of a later training in the same directory differ."""
    newest = max((path.stat().st_mtime for path in model.glob("*.safetensors")), default=None)
    return None if newest is None else datetime.fromtimestamp(newest, UTC).isoformat()

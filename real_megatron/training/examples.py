"""Training examples as groups of tokens: prompts alone for reinforcement learning, with CoTs for supervision."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompts, encode_targets, load_examples
from real_megatron.policy.runtime import default_device, default_dtype, start_process_group
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.factory import build_engine
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError
from real_megatron.training.sampler import rollout_seed

logger = logging.getLogger(__name__)

GENERATED = "generated_cots.jsonl"
"""CoTs that `sft.cots: generated` sampled, in the run's output directory: one record an example, `id` and `cot`."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint; remote code is never run."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def prompt_groups(config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> list[Group]:
    """Prompt and label of every training example, without responses yet. Too long prompts are dropped and counted."""
    examples = _load(config, scale)
    kept = encode_prompts(tokenizer, examples, config.rollout.max_prompt_tokens, config.data.chat_template)
    return _some([Group(prompt_ids, [], example.label, example.id) for example, prompt_ids in kept])


def target_groups(config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> list[Group]:
    """Every training example with its CoT, given or generated. Too long ones are dropped and counted. Collective."""
    examples = _load(config, scale)
    if config.sft.cots == "generated":
        examples = _with_generated_cots(config, examples, scale)
    limits = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
    return _some(encode_targets(tokenizer, scale, examples, *limits, config.data.chat_template))


def _load(config: RunConfig, scale: ScoreScale) -> list[JudgeExample]:
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one training data set")
    return [e for source in config.data.train for e in load_examples(source, config.data.template, scale.values)]


def _some(groups: list[Group]) -> list[Group]:
    if not groups:
        raise ConfigError(
            "no training example is left: raise rollout.max_prompt_tokens or rollout.max_new_tokens, or use other data"
        )
    return groups


def _with_generated_cots(config: RunConfig, examples: Sequence[JudgeExample], scale: ScoreScale) -> list[JudgeExample]:
    """The examples with CoTs sampled by `sft.cot_model`; those it left without an anchor are dropped and counted.

    They are kept in the output directory, so that a resumed run trains on the same ones. Collective.
    """
    file = config.output / GENERATED
    if not dist.is_initialized():
        start_process_group()
    found = [file.exists()]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        _write(file, _generate(config, examples, scale))
    dist.barrier()
    by_id = {example.id: example for example in examples}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    unknown = [row["id"] for row in rows if row["id"] not in by_id]
    if unknown:
        raise ConfigError(f"{file} holds CoTs of examples that data.train has not, such as {unknown[0]}: remove it")
    return [replace(by_id[row["id"]], id=f"{row['id']}#{i}", cot=row["cot"]) for i, row in enumerate(rows)]


def _generate(config: RunConfig, examples: Sequence[JudgeExample], scale: ScoreScale) -> list[dict[str, str]]:
    assert config.sft.cot_model is not None
    tokenizer = load_tokenizer(config.sft.cot_model)
    names = config.scale.scores, config.scale.values, config.scale.anchor
    writer_scale = ScoreScale.resolve(tokenizer, *names)
    kept = encode_prompts(tokenizer, examples, config.rollout.max_prompt_tokens, config.data.chat_template)
    rollout, count = config.rollout, config.sft.cots_per_example
    engine = build_engine(
        rollout,
        Path(config.sft.cot_model),
        tokenizer,
        config.output / "rollout",
        device=default_device(),
        dtype=default_dtype(config.model.dtype),
        serve_loaded=True,
        group=None if dist.get_world_size() == 1 else dist.new_group(backend="gloo"),
    )
    try:
        sampled = sample_trajectories(
            engine,
            tokenizer,
            writer_scale,
            [prompt_ids for _, prompt_ids in kept],
            SamplingParams(count, rollout.temperature, rollout.top_p, rollout.max_new_tokens),
            "drop",
            [rollout_seed(config.seed, 0, i) for i in range(len(kept))],
        )
    finally:
        engine.close()
    rows = [
        {"id": example.id, "cot": tokenizer.decode(t.response_ids).removesuffix(writer_scale.anchor_text).strip()}
        for (example, _), trajectories in zip(kept, sampled.trajectories, strict=True)
        for t in trajectories
    ]
    logger.info("%d CoTs generated; %d had no anchor and were dropped", len(rows), len(kept) * count - len(rows))
    return rows


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    if dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".partial")
        fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(fresh, file)

"""CoTs that a model writes before supervised training begins: TRACT's second stage trains on its own first stage's."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompts
from real_megatron.policy.runtime import start_process_group
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.sections import ConfigError
from real_megatron.training.sampler import rollout_seed
from real_megatron.training.serving import served

logger = logging.getLogger(__name__)

FILE = "generated_cots.jsonl"
"""In the run's output directory. The first line holds what the CoTs depend on, each further one a CoT: `example` (its
place in data.train, from 0), `id` and `cot`."""

Row = dict[str, Any]


def with_generated_cots(config: RunConfig, examples: Sequence[JudgeExample]) -> list[JudgeExample]:
    """The examples with CoTs sampled by `sft.cot_model`; CoTs without an anchor are dropped and counted. They are kept
    in the output directory, so that a resumed run trains on the same ones. Collective.

    Raises ConfigError when the directory holds CoTs that were sampled with other settings, or no CoT has an anchor.
    """
    file = config.output / FILE
    if not dist.is_initialized():
        start_process_group()
    found = [file.exists()]
    dist.broadcast_object_list(found, src=0)
    if not found[0]:
        _write(file, _settings(config), _generate(config, examples))
    dist.barrier()
    rows = _read(file, _settings(config))
    return [replace(examples[row["example"]], id=f"{row['id']}#{i}", cot=row["cot"]) for i, row in enumerate(rows)]


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides the CoTs, by dotted key."""
    tree = config.model_dump(mode="json")
    keys = ("seed", "scale", "data.train", "data.template", "data.chat_template", "sft.cot_model")
    keys += ("sft.cots_per_example", "rollout.temperature", "rollout.top_p")
    keys += ("rollout.max_prompt_tokens", "rollout.max_new_tokens")
    return {key: tree[key] if key in tree else tree[key.split(".")[0]][key.split(".")[1]] for key in keys}


def _generate(config: RunConfig, examples: Sequence[JudgeExample]) -> list[Row]:
    place = {id(example): i for i, example in enumerate(examples)}  # ids may repeat in other data sets
    rollout, count = config.rollout, config.sft.cots_per_example
    assert config.sft.cot_model is not None
    with served(config, Path(config.sft.cot_model), config.output / "rollout") as writer:
        tokenizer, scale = writer.tokenizer, writer.scale
        kept = encode_prompts(tokenizer, examples, rollout.max_prompt_tokens, config.data.chat_template)
        sampled = sample_trajectories(
            writer.engine,
            tokenizer,
            scale,
            [prompt_ids for _, prompt_ids in kept],
            SamplingParams(count, rollout.temperature, rollout.top_p, rollout.max_new_tokens),
            "drop",
            [rollout_seed(config.seed, 0, i) for i in range(len(kept))],
        )
    rows = []
    for (example, _), trajectories in zip(kept, sampled.trajectories, strict=True):
        for t in trajectories:
            text = tokenizer.decode(t.response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            cot = text.removesuffix(scale.anchor_text).strip()
            rows.append({"example": place[id(example)], "id": example.id, "cot": cot})
    if not rows:
        raise ConfigError(
            f"{config.sft.cot_model} wrote no CoT with the anchor {scale.anchor_text!r} to {len(kept)} prompts: train "
            "it further, or raise rollout.max_new_tokens"
        )
    logger.info("%d CoTs generated; %d had no anchor and were dropped", len(rows), len(kept) * count - len(rows))
    return rows


def _write(file: Path, settings: dict[str, Any], rows: Sequence[Row]) -> None:
    if dist.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".partial")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in ({"settings": settings}, *rows))
        fresh.write_text("".join(lines), encoding="utf-8")
        os.replace(fresh, file)


def _read(file: Path, settings: dict[str, Any]) -> list[Row]:
    # Not splitlines(): CoTs may hold other line separators, such as U+2028.
    with file.open(encoding="utf-8", newline="\n") as lines:
        first, *rows = map(json.loads, lines)
    before = first.get("settings", {})
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        what = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{file} holds CoTs that were sampled with other settings ({what}): remove it to sample anew, or choose "
            "another output directory"
        )
    return rows

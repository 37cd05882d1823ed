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
from real_megatron.training.rank0 import from_rank_0
from real_megatron.training.sampler import rollout_seed
from real_megatron.training.serving import served

logger = logging.getLogger(__name__)

FILE = "generated_cots.jsonl"
"""In the run's output directory. The first line holds what the CoTs depend on, each further one a CoT: `example` (its
place in data.train, from 0), `id` and `cot`."""

CHUNK = 1024
"""Prompts sampled between two writes."""
CHUNK_END = '{"prompts": '
"""How the line behind a chunk begins, in a file that is not complete; it says how many prompts are done."""

Row = dict[str, Any]


def with_generated_cots(config: RunConfig, examples: Sequence[JudgeExample]) -> list[JudgeExample]:
    """The examples with CoTs sampled by `sft.cot_model`; CoTs without an anchor are dropped and counted. They are kept
    in the output directory, so that a resumed run trains on the same ones. Collective.

    Raises ConfigError when the directory holds CoTs that were sampled with other settings, or no CoT has an anchor.
    """
    file = config.output / FILE
    if not dist.is_initialized():
        start_process_group(config.parallel)
    if not from_rank_0(file.exists):
        _generate(config, examples, file)
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


def _generate(config: RunConfig, examples: Sequence[JudgeExample], file: Path) -> None:
    """Sample in chunks, each written before the next begins: an interrupted run goes on behind the last one."""
    place = {id(example): i for i, example in enumerate(examples)}  # ids may repeat in other data sets
    rollout, count, partial = config.rollout, config.sft.cots_per_example, file.with_suffix(".partial")
    assert config.sft.cot_model is not None
    with served(config, Path(config.sft.cot_model), config.output / "rollout") as writer:
        tokenizer, scale = writer.tokenizer, writer.scale
        kept = encode_prompts(tokenizer, examples, rollout.max_prompt_tokens, config.data.chat_template)
        params = SamplingParams(count, rollout.temperature, rollout.top_p, rollout.max_new_tokens)
        for begin in range(from_rank_0(lambda: _go_on(partial, _settings(config))), len(kept), CHUNK):
            part = kept[begin : begin + CHUNK]
            seeds = [rollout_seed(config.seed, 0, begin + i) for i in range(len(part))]
            prompts = [prompt_ids for _, prompt_ids in part]
            sampled = sample_trajectories(writer.engine, tokenizer, scale, prompts, params, "drop", seeds)
            rows = []
            for (example, _), trajectories in zip(part, sampled.trajectories, strict=True):
                for t in trajectories:
                    text = tokenizer.decode(
                        t.response_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
                    )
                    cot = text.removesuffix(scale.anchor_text).strip()
                    rows.append({"example": place[id(example)], "id": example.id, "cot": cot})
            rows.append({"prompts": begin + len(part)})
            from_rank_0(lambda rows=rows: _append(partial, rows))
            logger.info("CoTs of %d of %d prompts are sampled", begin + len(part), len(kept))
    found = from_rank_0(lambda: _finish(partial, file))
    if not found:
        raise ConfigError(
            f"{config.sft.cot_model} wrote no CoT with the anchor {scale.anchor_text!r} to {len(kept)} prompts: train "
            "it further, or raise rollout.max_new_tokens"
        )
    logger.info("%d CoTs generated; %d had no anchor and were dropped", found, len(kept) * count - found)


def _go_on(partial: Path, settings: dict[str, Any]) -> int:
    """Prepare the file for further chunks, without what stands behind its last whole one; returns the prompts done."""
    lines = _lines(partial) if partial.exists() else []
    ends = [i for i, line in enumerate(lines) if line.startswith(CHUNK_END) and line.endswith("\n")]
    whole = max(ends, default=0)
    if whole == 0 or json.loads(lines[0]) != {"settings": settings}:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("", encoding="utf-8")
        _append(partial, [{"settings": settings}])
        return 0
    _replace(partial, lines[: whole + 1])
    done = json.loads(lines[whole])["prompts"]
    logger.info("%s: goes on behind %d prompts", partial, done)
    return done


def _append(partial: Path, rows: Sequence[Row]) -> None:
    with partial.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _finish(partial: Path, file: Path) -> int:
    """Give the file its final form and name, unless it holds no CoT; returns their number."""
    lines = [line for line in _lines(partial) if not line.startswith(CHUNK_END)]
    if len(lines) > 1:
        _replace(file, lines)
    partial.unlink()
    return len(lines) - 1


def _replace(file: Path, lines: Sequence[str]) -> None:
    fresh = file.with_suffix(".tmp")
    fresh.write_text("".join(lines), encoding="utf-8", newline="\n")
    os.replace(fresh, file)


def _lines(file: Path) -> list[str]:
    # Not splitlines(): CoTs may hold other line separators, such as U+2028.
    with file.open(encoding="utf-8", newline="\n") as lines:
        return list(lines)


def _read(file: Path, settings: dict[str, Any]) -> list[Row]:
    first, *rows = map(json.loads, _lines(file))
    before = first.get("settings", {})
    changed = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if changed:
        what = ", ".join(f"{key} was {before.get(key)!r}, is {settings.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{file} holds CoTs that were sampled with other settings ({what}): remove it to sample anew, or choose "
            "another output directory"
        )
    return rows

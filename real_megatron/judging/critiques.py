"""Critiques that a model writes for labelled examples, as a data set: TRACT's second stage trains on its own first
stage's critiques."""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from real_megatron.agreement import check_ranks_agree
from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompts, load_examples
from real_megatron.data.files import source_digest
from real_megatron.errors import ConfigError
from real_megatron.files import replace_text, writing
from real_megatron.hf.output import check_output_file
from real_megatron.judging.job import keep_settings, template_digest, weights_written
from real_megatron.judging.judge import Judge
from real_megatron.judging.reading import example_seed
from real_megatron.locks import hold
from real_megatron.rollout.distributed import collect
from real_megatron.rollout.engine import RolloutEngine, SamplingParams, naming_prompts
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.runtime import barrier, from_rank_0, join_torchrun, rank
from real_megatron.scores import decode

logger = logging.getLogger(__name__)

CHUNK = 1024
"""Prompts sampled between two writes."""
_CHUNK_END = '{"prompts": '
"""How the line behind a chunk begins in the unfinished file; it says how many prompts are done."""

Row = dict[str, Any]


def write_critiques(
    config: RunConfig,
    model: str | Path,
    output: Path,
    samples: int = 1,
    *,
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Let `model` write `samples` critiques for every example of `data.train`, into a plain JSONL file that SFT reads:
    `id`, `messages` (the prompt), `label`, `cot`, and the example's further columns. Returns the number of critiques.

    model: a directory, or a name on the hub (with `revision`: a branch, tag or commit)
    on_progress: called with the number of prompts done and of all

    Sampled with `rollout.temperature` and `rollout.top_p`, at most `data.max_response_tokens` long. A critique without
    an anchor is dropped and counted; too long prompts are dropped or cut (`data.long_prompts`) and counted. Written in
    chunks: the same call goes on behind the last whole chunk of a job that was killed, and does nothing when the file
    is complete. Collective under torchrun: ranks with an embedded engine share the prompts; rank 0 alone gets the
    critiques and writes them, every rank returns their number.

    Raises ConfigError when the output was begun with other settings, when another job writes it (`only_writer`), or
    when no critique has an anchor.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one data set whose prompts are to get critiques")
    check_output_file(output, "output")
    join_torchrun(config.parallel.timeout_minutes)
    check_ranks_agree(config)
    partial = output.with_name(output.name + ".partial")
    about = {"model": str(model), "revision": revision, "weights_written": weights_written(Path(model))}
    with ExitStack() as held:
        from_rank_0(lambda: hold(held, output))
        from_rank_0(lambda: _begin(output, partial, {**about, **_settings(config, samples)}))
        if from_rank_0(output.exists):
            logger.info("%s is complete", output)
            from_rank_0(lambda: partial.unlink(missing_ok=True))  # of a job that was killed between the two
            return from_rank_0(lambda: len(_lines(output)))
        work = output.parent / "rollout"
        with Judge.from_pretrained(model, revision=revision, config=config, work_dir=work, start=False) as judge:
            _sample(judge, samples, partial, on_progress)
        found = from_rank_0(lambda: _finish(partial, output))
        barrier()
    if not found:
        raise ConfigError(
            f"{model} wrote no critique with the anchor {judge.scale.anchor_text!r}: train it further, or raise "
            "data.max_response_tokens"
        )
    return found


def _settings(config: RunConfig, samples: int) -> dict[str, Any]:
    """What decides the critiques besides the model."""
    tree = config.model_dump(mode="json")
    data, rollout = tree["data"], tree["rollout"]
    return {
        "samples": samples,
        "seed": config.seed,
        "scale": tree["scale"],
        "template_digest": template_digest(data["template"]),
        "data_digests": [source_digest(source) for source in config.data.train],
        **{
            f"data.{key}": data[key]
            for key in (
                *("train", "template", "chat_template", "chat_template_args"),
                *("max_prompt_tokens", "long_prompts", "max_response_tokens"),
            )
        },
        **{f"rollout.{key}": rollout[key] for key in ("temperature", "top_p")},
    }


def _begin(output: Path, partial: Path, settings: dict[str, Any]) -> None:
    keep_settings(output, settings, begun=output.exists() or partial.exists())


def _sample(judge: Judge, samples: int, partial: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
    config, tokenizer, scale = judge.config, judge.tokenizer, judge.scale
    data, rollout = config.data, config.rollout
    sources = [
        load_examples(source, data.template, scale.values, critiques=False, aspects=scale.aspects)
        for source in data.train
    ]
    # Ids may repeat in other data sets.
    examples = [(f"{number}/{e.id}" if len(sources) > 1 else e.id, e) for number, s in enumerate(sources) for e in s]
    ids = {id(example): name for name, example in examples}
    kept = encode_prompts(tokenizer, [e for _, e in examples], data).kept
    params = SamplingParams(samples, rollout.temperature, rollout.top_p, data.max_response_tokens)
    done, dropped = from_rank_0(lambda: _go_on(partial)), 0
    if on_progress is not None:
        on_progress(done, len(kept))
    for begin in range(done, len(kept), CHUNK):
        chunk = kept[begin : begin + CHUNK]
        names = [ids[id(example)] for example, _ in chunk]
        seeds = [example_seed(config.seed, "written critique", name) for name in names]
        prompts = [prompt_ids for _, prompt_ids in chunk]
        with naming_prompts([f"data.train: {name}" for name in names]):
            written = _written(judge, prompts, params, seeds)
        rows: list[Row] = []
        for name, (example, _), texts in zip(names, chunk, written, strict=rank() == 0):
            dropped += samples - len(texts)
            rows += [_row(f"{name}#{k}", example, text) for k, text in enumerate(texts)]
        rows.append({"prompts": begin + len(chunk)})
        from_rank_0(lambda rows=rows: _append(partial, rows))  # type: ignore[misc]  # mypy cannot infer such a lambda
        if on_progress is not None:
            on_progress(begin + len(chunk), len(kept))
    if dropped:
        logger.warning("%d critiques had no anchor and were dropped", dropped)


def _written(
    judge: Judge, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int]
) -> list[list[str]]:
    """The texts of each prompt's critiques that have an anchor, without it; none on ranks other than 0."""
    tokenizer, scale = judge.tokenizer, judge.scale

    def text(ids: list[int]) -> str:
        return decode(tokenizer, ids).removesuffix(scale.anchor_text).strip()

    def serve(engine: RolloutEngine, indices: list[int]) -> list[list[str]]:
        own = [prompts[i] for i in indices]
        sampled = sample_trajectories(engine, tokenizer, scale, own, params, "drop", [seeds[i] for i in indices])
        return [[text(trajectory.response_ids) for trajectory in row] for row in sampled.trajectories]

    return collect(judge.engine, [len(prompt) for prompt in prompts], serve)


def _row(name: str, example: JudgeExample, cot: str) -> Row:
    label = list(example.labels) if example.labels else example.label
    return {**example.meta, "id": name, "messages": example.messages, "label": label, "cot": cot}


def _go_on(partial: Path) -> int:
    """Prepare the file for further chunks, without what stands behind its last whole one; returns the prompts done."""
    lines = _lines(partial) if partial.exists() else []
    ends = [i for i, line in enumerate(lines) if line.startswith(_CHUNK_END) and line.endswith("\n")]
    whole = max(ends, default=-1)
    replace_text(partial, "".join(lines[: whole + 1]))
    if whole < 0:
        return 0
    done: int = json.loads(lines[whole])["prompts"]
    logger.info("%s: goes on behind %d prompts", partial, done)
    return done


def _append(partial: Path, rows: Sequence[Row]) -> None:
    with writing(partial), partial.open("a", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _finish(partial: Path, output: Path) -> int:
    """Give the file its final form and name, unless it holds no critique; returns their number."""
    lines = [line for line in _lines(partial) if not line.startswith(_CHUNK_END)]
    if lines:
        replace_text(output, "".join(lines))
    partial.unlink()
    return len(lines)


def _lines(file: Path) -> list[str]:
    # Not splitlines(): critiques may hold other line separators, such as U+2028.
    with file.open(encoding="utf-8", newline="\n") as lines:
        return list(lines)

"""Training examples as groups of tokens: prompts alone for reinforcement learning, with CoTs for supervision."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group
from real_megatron.config import DataSource, RunConfig
from real_megatron.data import EncodedGroups, JudgeExample, encode_prompts, encode_targets, load_examples
from real_megatron.data.critiques import find_leak
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import ConfigError, DataError
from real_megatron.hf.stop_ids import stop_ids
from real_megatron.scores import ScoreScale


def prompt_groups(
    config: RunConfig, model_dir: Path, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale
) -> EncodedGroups:
    """Prompt and label of every training example, without responses yet. Too long prompts: `data.long_prompts`."""
    examples = [example for _, loaded in _load(config, scale, critiques=False) for example in loaded]
    prompts = encode_prompts(tokenizer, examples, config.data)
    groups = (Group(ids, [], example.label, example.id, example.meta, example.labels) for example, ids in prompts.kept)
    return _some(EncodedGroups(StoredGroups.of(groups), prompts.dropped, prompts.cut))


def target_groups(
    config: RunConfig, model_dir: Path, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale
) -> EncodedGroups:
    """Every training example with its CoT, or without one (`sft.cots`). Too long ones are dropped or cut, and
    counted (`encode_targets`).

    Raises DataError for a data set whose critiques say their label, since the score token would copy it.
    """
    examples: list[JudgeExample] = []
    given = config.sft.cots != "none"
    for source, loaded in _load(config, scale, critiques=given):
        if not given:
            loaded = [replace(example, cot="") for example in loaded]
        else:
            without = next((example.id for example in loaded if example.cot is None), None)
            if without is not None:
                raise DataError(
                    f"{source.path}: example {without} has no critique: supervised training needs 'cot' in every "
                    "record; add it, or set sft.cots to none"
                )
            _check_critiques(source, loaded, scale)
        examples += loaded
    return _some(encode_targets(tokenizer, scale, examples, config.data, stop_ids(model_dir, tokenizer)))


def _load(config: RunConfig, scale: ScoreScale, critiques: bool) -> Iterator[tuple[DataSource, list[JudgeExample]]]:
    """Every training data set with its examples, whose critiques are read where they are needed."""
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one training data set")
    for source in config.data.train:
        yield (
            source,
            load_examples(source, config.data.template, scale.values, critiques=critiques, aspects=scale.aspects),
        )


def _check_critiques(source: DataSource, examples: list[JudgeExample], scale: ScoreScale) -> None:
    if source.score_statement == "keep":
        return
    anchor = scale.anchor_text.strip()
    for a, aspect in enumerate(scale.parts):
        labels = [e.labels[a] if scale.aspects else e.label for e in examples]
        given = [
            (e.id, e.cot.partition(anchor)[0], aspect.label_index(label))
            for e, label in zip(examples, labels, strict=True)
            if e.cot is not None and label is not None
        ]
        leak = find_leak([cot for _, cot, _ in given], [label for *_, label in given], aspect.texts, aspect.values)
        if leak.found:
            shown = "; ".join(f"{given[i][0]}: {given[i][1].strip()[-80:]!r}" for i in leak.examples)
            raise DataError(
                f"{source.path}: {leak.stated} of {leak.critiques} critiques say the label"
                f"{f' of {aspect.name}' if aspect.name else ''} in their first or last sentences (by chance: "
                f"{leak.by_chance:.0f}), so that the judge would learn to copy it: {shown}; set critique_end of this "
                "data set to a regular expression that matches where the statement begins, or score_statement: keep if "
                "it is meant"
            )


def _some(encoded: EncodedGroups) -> EncodedGroups:
    if not encoded.groups:
        raise ConfigError(
            "no training example is left: raise data.max_prompt_tokens or data.max_response_tokens, set "
            "data.long_prompts=cut_left, or use other data"
        )
    return encoded

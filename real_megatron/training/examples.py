"""Training examples as groups of tokens: prompts alone for reinforcement learning, with CoTs for supervision."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompts, encode_targets, load_examples
from real_megatron.errors import ConfigError
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.stop_ids import stop_ids
from real_megatron.scores import ScoreScale


def prompt_groups(config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> list[Group]:
    """Prompt and label of every training example, without responses yet. Too long prompts: `data.long_prompts`."""
    examples = _load(config, scale)
    kept = encode_prompts(tokenizer, examples, config.data).kept
    return _some([Group(ids, [], example.label, example.id, example.meta) for example, ids in kept])


def target_groups(config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> list[Group]:
    """Every training example with its CoT, or without one (`sft.cots`). Too long ones are dropped or cut, and
    counted (`encode_targets`)."""
    examples = _load(config, scale)
    if config.sft.cots == "none":
        examples = [replace(example, cot="") for example in examples]
    stops = stop_ids(checkpoint_directory(config.model.path, config.model.revision, weights=False), tokenizer)
    return _some(encode_targets(tokenizer, scale, examples, config.data, stops))


def _load(config: RunConfig, scale: ScoreScale) -> list[JudgeExample]:
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one training data set")
    return [e for source in config.data.train for e in load_examples(source, config.data.template, scale.values)]


def _some(groups: list[Group]) -> list[Group]:
    if not groups:
        raise ConfigError(
            "no training example is left: raise data.max_prompt_tokens or data.max_response_tokens, set "
            "data.long_prompts=cut_left, or use other data"
        )
    return groups

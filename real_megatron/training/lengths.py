"""Whether prompts leave room for a response, before a model is loaded for nothing."""

from collections.abc import Mapping
from pathlib import Path

from real_megatron.config import RunConfig
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import ConfigError
from real_megatron.hf.rotary import longest_sequence
from real_megatron.hf.side_files import read_config
from real_megatron.judging.evaluate import EvaluationSet
from real_megatron.rollout.factory import find_engine


def check_lengths(
    config: RunConfig, model_dir: Path, groups: StoredGroups, evaluation_sets: Mapping[str, EvaluationSet]
) -> None:
    """Raise ConfigError for a prompt of the training groups (reinforcement learning) or evaluation sets that is longer,
    with a response of `data.max_response_tokens`, than the model's positions without those that the engine keeps free.

    The engine refuses such a prompt when it comes to it, which may be hours after the start, and again after a resume.
    """
    positions = longest_sequence(read_config(model_dir))
    prompts = []
    if config.is_rl:
        longest = int(groups.prompt_lengths.argmax())
        prompts.append(("data.train", groups[longest].example_id, int(groups.prompt_lengths[longest])))
    for name, dev in evaluation_sets.items():
        prompts += [(f"data.eval.{name}", prompt.id, len(prompt.prompt_ids)) for prompt in dev.prompts]
    if not prompts or positions is None:
        return
    free = find_engine(config.rollout.engine).reserved_tokens
    place, example, tokens = max(prompts, key=lambda prompt: prompt[2])
    response = config.data.max_response_tokens
    if tokens + response + free > positions:
        kept = f", of which rollout.engine = {config.rollout.engine} keeps {free} free" if free else ""
        raise ConfigError(
            f"{place}: example {example} has a prompt of {tokens} tokens, and a response may have {response} "
            f"(data.max_response_tokens): the model has {positions} positions (max_position_embeddings in config.json, "
            f"or what its rope_type allows){kept}; set data.max_prompt_tokens to {positions - free - response} or less "
            "(data.long_prompts says what becomes of longer ones), or lower data.max_response_tokens"
        )

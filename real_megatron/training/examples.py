"""Training examples as tokens."""

import logging
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.data import JudgeExample, encode_prompt, load_examples
from real_megatron.scores import ScoreScale
from real_megatron.sections import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """An example and its prompt as tokens."""

    example: JudgeExample
    prompt_ids: list[int]

    @property
    def label(self) -> float:
        return self.example.label

    @property
    def id(self) -> str:
        return self.example.id


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint; remote code is never run."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def load_training_examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase, scale: ScoreScale) -> list[Prepared]:
    """All examples of `data.train` whose prompt is not too long; what is dropped is counted and logged.

    Raises ConfigError when nothing is left, ValueError for a label outside of the scale.
    """
    if not config.data.train:
        raise ConfigError("data.train is empty: name at least one training data set")
    kept: list[Prepared] = []
    for source in config.data.train:
        examples = load_examples(source, config.data.template)
        for example in examples:
            scale.validate_label(example.label, f"{source.path}, example {example.id}")
        prepared = [Prepared(example, encode_prompt(tokenizer, example)) for example in examples]
        short = [p for p in prepared if len(p.prompt_ids) <= config.rollout.max_prompt_tokens]
        if len(short) < len(prepared):
            logger.warning(
                "%s: dropped %d of %d examples whose prompt is longer than rollout.max_prompt_tokens = %d",
                source.path,
                len(prepared) - len(short),
                len(prepared),
                config.rollout.max_prompt_tokens,
            )
        kept += short
    if not kept:
        raise ConfigError(
            f"no training example is left: every prompt is longer than rollout.max_prompt_tokens = "
            f"{config.rollout.max_prompt_tokens}"
        )
    logger.info("%d training examples", len(kept))
    return kept

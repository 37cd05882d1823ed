"""A tiny random model on an engine, and examples that it judges."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.judging.evaluate import EvaluationPrompt
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.scores import ScoreScale
from tests.support.rollout_models import tiny_qwen3, word_level


@pytest.fixture(scope="session")
def tokenizer():
    return word_level()


@pytest.fixture(scope="session")
def scale(tokenizer):
    return ScoreScale.resolve(tokenizer, ["1", "2", "3"], None, "[RESULT] ")


@pytest.fixture(scope="session")
def engine(tokenizer):
    """Random weights; of its nine words one is the anchor, so some responses reach it and some do not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_qwen3(len(tokenizer)))
    engine = TransformersEngine(model.config, tokenizer)
    engine.update_weights(model.named_parameters(), 0)
    return engine


@pytest.fixture(scope="session")
def examples(tokenizer):
    """Twenty examples with different prompts and labels."""
    texts = [f"{1 + i % 3} {' '.join('abc'[: 1 + i % 2] * (1 + i // 6))}" for i in range(20)]
    return [EvaluationPrompt(f"e{i}", 1.0 + i % 3, tokenizer.encode(text)) for i, text in enumerate(texts)]

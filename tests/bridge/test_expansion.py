"""The parameter tables against transformers' own models on the meta device, at real sizes."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from real_megatron.bridge import describe, padded_vocab, parameter_count, parameters
from tests.support.bridge_ranks import VARIANTS, tiny_config

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"

# Totals that the Hugging Face hub shows for the published safetensors.
PUBLISHED = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Mistral-7B-v0.2": 7_241_732_096,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-72B": 72_706_203_648,
}


def real_config(name: str) -> PretrainedConfig:
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def transformers_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint that transformers would write (one tensor per expert; tied weights once)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def table_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in parameters(describe(config)):
        assert not shapes.keys() & parameter.hf_shapes.keys(), "a tensor is produced twice"
        shapes.update(parameter.hf_shapes)
    return shapes


def test_fixtures_are_those_with_a_published_count() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_models_map_completely(name: str) -> None:
    config = real_config(name)
    assert table_shapes(config) == transformers_shapes(config)
    assert parameter_count(describe(config)) == PUBLISHED[name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_map_completely(variant: str) -> None:
    config = tiny_config(variant)
    assert table_shapes(config) == transformers_shapes(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_megatron_side(name: str) -> None:
    description = describe(real_config(name))
    rows = padded_vocab(description, 8, 64)
    table = parameters(description, vocab_rows=rows)
    names = [n for p in table for n in {p.name, p.te_name}]
    assert len(names) == len(set(names))
    padding = sum(prod(p.transform.shape) for p in table) - parameter_count(description)
    vocabularies = 1 if description.tied else 2
    assert padding == vocabularies * (rows - description.vocab_size) * description.hidden_size
    for parameter in table:
        shard = prod(parameter.transform.shard_shape(8))
        assert shard * (1 if parameter.transform.split_axis is None else 8) == prod(parameter.transform.shape)


def test_padded_vocab() -> None:
    description = describe(tiny_config("qwen2"))
    assert [
        padded_vocab(description, tensor, multiple) for tensor, multiple in ((1, 1), (1, 64), (2, 64), (4, 64))
    ] == [
        131,
        192,
        256,
        256,
    ]

"""The stream's names against the checkpoint's headers."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from real_megatron.errors import EngineError
from real_megatron.rollout.checkpoint_names import check_names, checkpoint_shapes
from tests.support.rollout_models import tiny_qwen3


@pytest.fixture
def directory(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_qwen3(64))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path, {name: list(p.shape) for name, p in model.named_parameters()}


def test_the_same_set_passes_with_or_without_the_tied_head(directory):
    path, shapes = directory
    check_names(path, shapes, tied=True)
    check_names(path, shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}, tied=True)
    assert checkpoint_shapes(path)["model.norm.weight"] == (32,)


def test_every_difference_is_named(directory):
    path, shapes = directory
    del shapes["model.norm.weight"]
    shapes["model.layers.7.mlp.up_proj.weight"] = [1]
    shapes["model.embed_tokens.weight"] = [128, 32]
    with pytest.raises(EngineError) as error:
        check_names(path, shapes, tied=True)
    for text in ("1 missing: model.norm", "1 unknown: model.layers.7", "1 misshapen: model.embed_tokens"):
        assert text in str(error.value)


def test_an_untied_head_must_come(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    check_names(tmp_path, shapes, tied=False)
    del shapes["lm_head.weight"]
    with pytest.raises(EngineError, match="missing: lm_head.weight"):
        check_names(tmp_path, shapes, tied=False)


def test_rotary_frequencies_of_old_checkpoints_are_no_weights(directory):
    path, shapes = directory
    (path / "model.safetensors.index.json").unlink()
    for file in path.glob("*.safetensors"):
        file.unlink()
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path / "model.safetensors")
    check_names(path, shapes, tied=True)


def test_a_directory_without_safetensors_passes(tmp_path):
    check_names(tmp_path, {"x": [1]}, tied=False)

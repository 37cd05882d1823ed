"""Models under the Transformer Engine spec's names, and faults between a model and the table."""

from pathlib import Path

import pytest
import torch

from real_megatron.bridge import convert_hf_to_megatron, describe, load_hf
from real_megatron.bridge.live import local_parameters
from real_megatron.errors import CheckpointError
from tests.support.bridge_ranks import (
    continue_with_norms_of,
    load_with_transformer_engine_norms,
    tiny_config,
    tiny_model,
    transformer_engine_spec,
)
from tests.support.policy_ranks import VOCAB, make_config, write_checkpoint
from tests.support.ranks import run_ranks

# Parameter names of Megatron-Core's Transformer Engine layer specs, for a rank with 4 local experts.
ATTENTION = [
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
]
DENSE = [*ATTENTION, "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
MOE = [
    *ATTENTION,
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    *(f"mlp.experts.linear_fc{n}.weight{e}" for n in (1, 2) for e in range(4)),
]


def test_transformer_engine_names(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    layers = {0: MOE, 1: DENSE, 2: MOE, 3: MOE}
    assert run_ranks(2, transformer_engine_spec, str(tmp_path), layers) == [[], []]


@pytest.mark.parametrize("variant, norms", [("qwen3", 1 + 4 * 2), ("qwen3_moe", 1 + 4 * 2 + 3), ("llama2", 1)])
def test_transformer_engine_norms_find_their_extra_state(tmp_path: Path, variant: str, norms: int) -> None:
    """Without it Megatron's load ends with `Missing key in checkpoint state_dict: …final_layernorm._extra_state…`."""
    tiny_model(variant).save_pretrained(tmp_path / "hf")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", workers=1, progress=False)
    found = run_ranks(1, load_with_transformer_engine_norms, str(tmp_path / "hf"), str(tmp_path / "megatron"))
    assert found == [norms]


SPECS = ("local", "transformer_engine")


@pytest.mark.parametrize("written", SPECS)
def test_training_checkpoints_go_from_one_layer_spec_to_the_other(tmp_path: Path, written: str) -> None:
    """Norms have an `_extra_state` in one, and the norm before experts had another name. All else is the same here, so
    the steps that follow are bit-identical."""
    small = tiny_config("qwen3_moe", vocab_size=VOCAB, num_hidden_layers=2, num_experts=4, mlp_only_layers=[0])
    config = make_config(write_checkpoint(tmp_path / "hf", small))
    (other,) = set(SPECS) - {written}
    expected = run_ranks(1, continue_with_norms_of, written, config, None, tmp_path / "saved")[0]
    found = run_ranks(1, continue_with_norms_of, other, config, tmp_path / "saved", None)[0]
    assert found.metrics == expected.metrics
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    layers = {0: MOE, 1: DENSE[:-1], 2: MOE, 3: MOE}
    with pytest.raises(RuntimeError, match="has no parameter 'decoder.layers.1.mlp.linear_fc2.weight'"):
        run_ranks(2, transformer_engine_spec, str(tmp_path), layers)


def test_an_unknown_parameter_is_named() -> None:
    model = torch.nn.Module()
    model.vocab_size = 192
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList()
    model.decoder.surprise = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(KeyError, match="'decoder.surprise' is not in the table of family 'qwen2'"):
        list(local_parameters([model], describe(tiny_config("qwen2"))))


def test_weights_of_another_model_are_refused_before_any_is_loaded(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="q_proj.weight' has shape"):
        load_hf([], describe(tiny_config("qwen3", head_dim=32, rope_parameters=None)), tmp_path)

"""Configurations to descriptions: what is expressed, and what is refused with a reason."""

import pytest
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from real_megatron.bridge import describe, parameters, register_family
from real_megatron.bridge.families import FAMILIES, llama
from real_megatron.errors import ConfigError, UnsupportedModel
from tests.support.bridge_ranks import VARIANTS, tiny_config


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_accepts_every_description(variant: str) -> None:
    description = describe(tiny_config(variant))
    config = TransformerConfig(**description.transformer_config)
    assert config.num_layers == len(description.sliding_window) == 4
    assert config.activation_func is F.silu and config.normalization == "RMSNorm"
    assert config.hidden_dropout == config.attention_dropout == 0


def test_sliding_windows() -> None:
    assert describe(tiny_config("qwen2")).sliding_window == (None, None, 5, 5)
    assert describe(tiny_config("qwen2", use_sliding_window=False)).sliding_window == (None,) * 4
    assert describe(tiny_config("mistral")).sliding_window == (5,) * 4
    assert describe(tiny_config("mistral", sliding_window=None)).sliding_window == (None,) * 4
    assert describe(tiny_config("llama3")).sliding_window == (None,) * 4


def test_head_width_and_groups() -> None:
    qwen3 = describe(tiny_config("qwen3"))
    assert (qwen3.head_dim, qwen3.num_heads, qwen3.num_groups) == (24, 8, 2)
    assert describe(tiny_config("qwen2")).head_dim == 8
    assert describe(AutoConfig.for_model("llama", num_attention_heads=4, hidden_size=16)).num_groups == 4


def test_mixtures_of_experts() -> None:
    some = describe(tiny_config("qwen3_moe"))
    assert [some.is_moe_layer(i) for i in range(4)] == [True, False, True, True]
    assert some.transformer_config["moe_router_pre_softmax"] is False
    half = describe(tiny_config("qwen3_moe_tied"))
    assert [half.is_moe_layer(i) for i in range(4)] == [False, True, False, True]
    assert half.transformer_config["moe_router_pre_softmax"] is True
    dense = describe(tiny_config("qwen3"))
    assert dense.num_experts == 0 and not dense.is_moe_layer(0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            AutoConfig.for_model("gpt2"),
            "model_type 'gpt2'.*Supported: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe",
        ),
        (AutoConfig.for_model("gemma2"), "gemma2.*normalise the outputs"),
        (AutoConfig.for_model("gemma3_text"), "gemma3_text.*normalise the outputs"),
        (AutoConfig.for_model("llama", hidden_act="gelu"), "hidden_act='gelu'"),
        (AutoConfig.for_model("llama", attention_bias=True), "only one of attention_bias and mlp_bias"),
        (AutoConfig.for_model("llama", mlp_bias=True), "only one of attention_bias and mlp_bias"),
        (AutoConfig.for_model("qwen3", attention_bias=True), "attention_bias"),
        (AutoConfig.for_model("qwen3_moe", attention_bias=True), "attention_bias"),
        (AutoConfig.for_model("llama", quantization_config={"quant_method": "fp8"}), "quantization_config"),
        (
            AutoConfig.for_model("llama", rope_parameters=dict(rope_type="proportional", rope_theta=1e4, factor=2.0)),
            "config.json: rope_parameters .*rope_type 'proportional' is not supported; supported are default, linear",
        ),
        (
            AutoConfig.for_model("llama", rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)),
            "partial_rotary_factor=0.5.*the whole head must be rotated",
        ),
        (AutoConfig.for_model("mixtral", num_experts_per_tok=1), "one expert per token"),
        (AutoConfig.for_model("qwen3_moe", mlp_only_layers=list(range(24))), "no layer with experts"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        describe(config)


def test_a_family_by_its_name() -> None:
    """`model.family` has precedence over the model_type."""
    description = describe(AutoConfig.for_model("granite"), "llama")
    assert description.family == "llama"
    assert parameters(description)[0].hf == ("model.embed_tokens.weight",)


@pytest.mark.parametrize("attribute", ["fancy", "attribute"], ids=["registered", "attribute"])
def test_a_family_of_a_module(extension_family: str, attribute: str) -> None:
    name = f"{extension_family}:{attribute}"
    config = tiny_config("llama2")
    description = describe(config, name)
    assert description.family == name, "the name that any process finds it by"
    assert parameters(description) and description.transformer_config == describe(config).transformer_config
    assert [p.hf_shapes for p in parameters(description)] == [p.hf_shapes for p in parameters(describe(config))]


def test_a_registered_family_serves_its_model_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FAMILIES, "_known", {name: FAMILIES[name] for name in FAMILIES})
    config = AutoConfig.for_model("granite")
    with pytest.raises(UnsupportedModel, match="model_type 'granite'.*Name a family of your own as model.family"):
        describe(config)
    assert register_family("granite", llama) is llama
    assert describe(config).family == "granite"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fancier", "model.family: unknown model family 'fancier'; known: llama, mistral"),
        ("tests.support.extension_family:nothing", "neither registers nor defines 'nothing'"),
        ("tests.support.extension_family:no_family", "is no model family: it needs a TABLE"),
        ("tests.support.no_such_module:fancy", "cannot be imported"),
    ],
)
def test_what_is_no_family_is_refused(extension_family: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(tiny_config("llama2"), name)

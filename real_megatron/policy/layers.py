"""Megatron-Core's layer specs with our core attention, and our norm where Transformer Engine is not there."""

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig
from real_megatron.policy.attention import PackedAttention
from real_megatron.policy.norm import RMSNorm
from real_megatron.policy.parallel_groups import no_transformer_engine


def block_spec(
    config: TransformerConfig, description: ModelDescription, model: ModelConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk of this rank."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = [
        layer_spec(config, description, model, description.is_moe_layer(index))
        for index in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_class(model))


def layer_spec(config: TransformerConfig, description: ModelDescription, model: ModelConfig, moe: bool) -> ModuleSpec:
    """A layer, attention and MLP, or with `moe` attention and experts."""
    use_te = uses_transformer_engine(model)
    build = (
        get_gpt_layer_with_transformer_engine_spec
        if use_te
        else partial(get_gpt_layer_local_spec, normalization="RMSNorm")
    )
    experts = description.num_experts if moe else None
    layer = build(num_experts=experts, moe_grouped_gemm=use_te, qk_layernorm=config.qk_layernorm)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(
        module=PackedAttention, params={"windows": description.sliding_window, "rotary": description.rotary}
    )
    if not use_te:
        if moe:  # Transformer Engine has no linear layer to fuse this norm into: stored under its own name there
            del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def norm_class(model: ModelConfig) -> Any:
    """The norm after the last layer."""
    if not uses_transformer_engine(model):
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers are Transformer Engine's, experts as one grouped matrix product."""
    return model.spec == "transformer_engine" or (model.spec == "auto" and not no_transformer_engine())

"""What the families have in common: pre-norm RMSNorm, grouped-query attention, SwiGLU, rotary embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.errors import UnsupportedModel
from real_megatron.hf.rotary import rotary


def place(config: PretrainedConfig) -> Path:
    """The file that a configuration is from, for messages."""
    return Path(config.name_or_path or "") / "config.json"


def refuse(config: PretrainedConfig, feature: str, why: str) -> None:
    """Raise the one error for a configuration that cannot be expressed."""
    raise UnsupportedModel(f"{place(config)}: model_type '{config.model_type}' with {feature} is not supported: {why}.")


def check_shared_features(config: PretrainedConfig) -> None:
    """Refuse what no family here supports: other activations, heads that are rotated in part, quantised weights."""
    if config.hidden_act != "silu":
        refuse(config, f"hidden_act='{config.hidden_act}'", "only 'silu' is")
    if getattr(config, "quantization_config", None):
        refuse(config, "quantization_config", "convert the checkpoint to bfloat16 or float32 first")
    partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        refuse(config, f"partial_rotary_factor={partial}", "the whole head must be rotated")


def describe_dense(
    config: PretrainedConfig,
    *,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    linear_bias: bool = False,
    sliding_window: Sequence[int | None] | None = None,
    **more: Any,
) -> ModelDescription:
    """Description of a pre-norm decoder; `more` are further TransformerConfig arguments."""
    check_shared_features(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    transformer_config = dict(
        num_layers=layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        kv_channels=getattr(config, "head_dim", None) or config.hidden_size // heads,
        normalization="RMSNorm",
        layernorm_epsilon=config.rms_norm_eps,
        qk_layernorm=qk_norm,
        add_qkv_bias=qkv_bias,
        add_bias_linear=linear_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.initializer_range,
        **more,
    )
    return ModelDescription(
        family=config.model_type,
        transformer_config=transformer_config,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        sliding_window=tuple(sliding_window) if sliding_window is not None else (None,) * layers,
        rotary=rotary(config),
    )


def moe_config(config: PretrainedConfig, *, width: int, normalised: bool, layers: Sequence[bool]) -> dict[str, Any]:
    """TransformerConfig arguments of a softmax top-k mixture of experts without capacity limit or shared expert.

    width: hidden width of one expert. normalised: the top-k probabilities are rescaled to sum to one, which equals a
    softmax over the top-k logits. layers: per layer, whether it is a mixture of experts.
    """
    if not any(layers):
        refuse(config, "no layer with experts", "Megatron-Core wants at least one")
    if config.num_experts_per_tok == 1 and normalised:
        refuse(config, "one expert per token and normalised routing weights", "the router would get no gradient")
    return dict(
        num_moe_experts=config.num_experts,
        moe_router_topk=config.num_experts_per_tok,
        moe_ffn_hidden_size=width,
        moe_router_pre_softmax=not normalised,
        moe_router_dtype="fp32",
        moe_layer_freq=[int(moe) for moe in layers],
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
    )

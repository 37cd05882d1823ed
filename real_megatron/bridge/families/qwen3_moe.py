"""Qwen3-MoE: Qwen3 whose MLPs are mixtures of many small experts."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, moe_config, refuse
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT, QK_NORM, moe

MODEL_TYPE = "qwen3_moe"
EXPERTS = moe("mlp.gate", "mlp.experts.{expert}", ("gate_proj", "up_proj", "down_proj"))
TABLE = (*EMBEDDING, *ATTENTION, *QK_NORM, *MLP, *EXPERTS, *OUTPUT)


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    if config.attention_bias:
        refuse(config, "attention_bias", "Megatron-Core cannot give the output projection a bias and the MLP none")
    layers = [
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]
    return describe_dense(
        config,
        qk_norm=True,
        sliding_window=[config.sliding_window] * config.num_hidden_layers,
        **moe_config(config, width=config.moe_intermediate_size, normalised=bool(config.norm_topk_prob), layers=layers),
    )

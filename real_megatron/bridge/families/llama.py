"""Llama 2 and 3.x. Code Llama, Yi, DeepSeek-LLM and others with `model_type: llama` are the same architecture."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, refuse

MODEL_TYPE = "llama"


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    if bool(config.attention_bias) != bool(config.mlp_bias):
        refuse(config, "only one of attention_bias and mlp_bias", "Megatron-Core switches both together")
    return describe_dense(config, qkv_bias=bool(config.attention_bias), linear_bias=bool(config.mlp_bias))

"""Qwen3, dense: a norm over each query and key head, head width independent of the hidden size."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, refuse
from real_megatron.bridge.families.qwen2 import layer_windows
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT, QK_NORM

MODEL_TYPE = "qwen3"
TABLE = (*EMBEDDING, *ATTENTION, *QK_NORM, *MLP, *OUTPUT)


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    if config.attention_bias:
        refuse(config, "attention_bias", "Megatron-Core cannot give the output projection a bias and the MLP none")
    return describe_dense(config, qk_norm=True, sliding_window=layer_windows(config))

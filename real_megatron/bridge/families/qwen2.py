"""Qwen2 and Qwen2.5: biases on query, key and value."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT, QKV_BIAS

MODEL_TYPE = "qwen2"
TABLE = (*EMBEDDING, *ATTENTION, *QKV_BIAS, *MLP, *OUTPUT)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer from `layer_types`."""
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    return describe_dense(config, qkv_bias=True, sliding_window=layer_windows(config))

"""Qwen2 and Qwen2.5: biases on query, key and value."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, refuse
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT, QKV_BIAS

MODEL_TYPE = "qwen2"
TABLE = (*EMBEDDING, *ATTENTION, *QKV_BIAS, *MLP, *OUTPUT)


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """The sliding window of each layer from `layer_types`. Raises UnsupportedModel for layers of other types."""
    others = sorted({*config.layer_types} - {"full_attention", "sliding_attention"})
    if others:
        refuse(config, f"layer_types '{others[0]}'", "only full_attention and sliding_attention are")
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    return describe_dense(config, qkv_bias=True, sliding_window=layer_windows(config))

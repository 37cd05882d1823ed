"""Mistral 7B v0.1 to v0.3: Llama with a sliding window (v0.1 only) on every layer."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT

MODEL_TYPE = "mistral"
TABLE = (*EMBEDDING, *ATTENTION, *MLP, *OUTPUT)


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    return describe_dense(config, sliding_window=[config.sliding_window] * config.num_hidden_layers)

"""Mixtral: Mistral whose MLPs are mixtures of a few large experts."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, moe_config
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, OUTPUT, moe

MODEL_TYPE = "mixtral"
EXPERTS = moe("block_sparse_moe.gate", "block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))
TABLE = (*EMBEDDING, *ATTENTION, *EXPERTS, *OUTPUT)


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    layers = config.num_hidden_layers
    return describe_dense(
        config,
        sliding_window=[config.sliding_window] * layers,
        **moe_config(config, width=config.intermediate_size, normalised=True, layers=[True] * layers),
    )

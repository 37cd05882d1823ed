"""A model family of your own. In the configuration: `model.family: family:seed_oss`."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families import register_family
from real_megatron.bridge.families.dense import describe_dense, refuse
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, MLP, OUTPUT, QKV_BIAS


class SeedOss:
    """Seed-OSS: a pre-norm decoder with biases on query, key and value."""

    TABLE = (*EMBEDDING, *ATTENTION, *QKV_BIAS, *MLP, *OUTPUT)

    def describe(self, config: PretrainedConfig) -> ModelDescription:
        """The configuration in Megatron-Core's terms."""
        if config.mlp_bias or config.attention_out_bias or not config.attention_bias:
            refuse(config, "other biases than those of query, key and value", "no published checkpoint has them")
        return describe_dense(config, qkv_bias=True)


register_family("seed_oss", SeedOss())

"""Llama 2 and 3.x. Code Llama, Yi, DeepSeek-LLM and others with `model_type: llama` are the same architecture."""

from dataclasses import replace

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families.dense import describe_dense, refuse
from real_megatron.bridge.families.rows import ATTENTION, EMBEDDING, HF, MEGATRON, MLP, OUTPUT, QKV_BIAS, hidden
from real_megatron.bridge.table import Rule
from real_megatron.bridge.transforms import GateUp

MODEL_TYPE = "llama"


def _biased(description: ModelDescription) -> bool:
    return description.transformer_config["add_bias_linear"]


BIASES = (
    *(replace(rule, when=_biased) for rule in QKV_BIAS),
    Rule(MEGATRON + "self_attention.linear_proj.bias", (HF + "self_attn.o_proj.bias",), hidden, when=_biased),
    Rule(
        MEGATRON + "mlp.linear_fc1.bias",
        (HF + "mlp.gate_proj.bias", HF + "mlp.up_proj.bias"),
        lambda d: GateUp(d.transformer_config["ffn_hidden_size"]),
        when=_biased,
    ),
    Rule(MEGATRON + "mlp.linear_fc2.bias", (HF + "mlp.down_proj.bias",), hidden, when=_biased),
)
TABLE = (*EMBEDDING, *ATTENTION, *MLP, *BIASES, *OUTPUT)


def describe(config: PretrainedConfig) -> ModelDescription:
    """See bridge.describe."""
    if bool(config.attention_bias) != bool(config.mlp_bias):
        refuse(config, "only one of attention_bias and mlp_bias", "Megatron-Core switches both together")
    return describe_dense(config, qkv_bias=bool(config.attention_bias), linear_bias=bool(config.mlp_bias))

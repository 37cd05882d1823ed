"""Model families: one file each, with the mapping of the configuration and the table of parameters."""

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription, UnsupportedModel
from real_megatron.bridge.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe

FAMILIES = {module.MODEL_TYPE: module for module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe)}

_SANDWICH = (
    "its layers normalise the outputs of attention and MLP once more before the residual addition, with weights stored "
    "as w - 1, and its embeddings are scaled; Megatron-Core 0.16's TransformerLayer has no place for these"
)
REFUSED = {
    "gemma": "its norms hold w - 1 and its embeddings are scaled, which Megatron-Core's local layers cannot express",
    "gemma2": f"{_SANDWICH}. Its soft-capped logits would also need another output head",
    "gemma3": f"{_SANDWICH}. It is also multi-modal",
    "gemma3_text": _SANDWICH,
}


def describe(hf_config: PretrainedConfig) -> ModelDescription:
    """The Megatron-Core description of a Hugging Face causal language model.

    Raises UnsupportedModel for an unknown architecture, or for a known one with a feature that has no counterpart.
    """
    family = hf_config.model_type
    if family in REFUSED:
        raise UnsupportedModel(f"model_type '{family}' is not supported: {REFUSED[family]}.")
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model_type '{family}' is not supported. Supported: {', '.join(sorted(FAMILIES))}. "
            "docs/adding_a_model_family.md tells how to add one."
        )
    return FAMILIES[family].describe(hf_config)

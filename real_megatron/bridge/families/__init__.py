"""Model families by name: each holds the mapping of the configuration and the table of parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from transformers import PretrainedConfig

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from real_megatron.bridge.families.dense import place
from real_megatron.bridge.table import Rule
from real_megatron.errors import ConfigError, UnsupportedModel
from real_megatron.registry import Registry, calling_module


@runtime_checkable
class Family(Protocol):
    """What the module of a family (or another object) has."""

    TABLE: tuple[Rule, ...]
    """Its parameters: which Hugging Face tensors make up which Megatron parameter."""

    def describe(self, config: PretrainedConfig) -> ModelDescription:
        """The configuration in Megatron-Core's terms. Raises UnsupportedModel for what cannot be expressed."""
        ...


FAMILIES: Registry[Family] = Registry("model family", "model.family")
for _module in (llama, mistral, mixtral, qwen2, qwen3, qwen3_moe):
    FAMILIES.register(_module.MODEL_TYPE, _module, _module.__name__)

_SANDWICH = (
    "its layers normalise the outputs of attention and MLP once more before the residual addition, with weights stored "
    "as w - 1, and its embeddings are scaled; Megatron-Core's TransformerLayer cannot express these"
)
REFUSED = {
    "gemma": "its norms hold w - 1 and its embeddings are scaled, which Megatron-Core's local layers cannot express",
    "gemma2": f"{_SANDWICH}. Its soft-capped logits would also need another output head",
    "gemma3": f"{_SANDWICH}. It is also multi-modal",
    "gemma3_text": _SANDWICH,
}


def register_family(name: str, family: Family) -> Family:
    """Add a family under the `model_type` of its config.json, or under another name for `model.family`; returns it."""
    return FAMILIES.register(name, family, calling_module())


def describe(hf_config: PretrainedConfig, family: str = "auto") -> ModelDescription:
    """The Megatron-Core description of a Hugging Face causal language model.

    family: a name of `model.family`: `auto` takes the family of the configuration's model_type; `module:name` is what
    that module has registered as `name`, or else its attribute `name`.

    Raises UnsupportedModel for an unknown architecture, or for a known one with a feature that has no counterpart, and
    ConfigError if `family` names no family.
    """
    if family == "auto":
        family = _supported(hf_config.model_type, place(hf_config))
    found = FAMILIES.find(family)
    if not isinstance(found, Family):
        raise ConfigError(f"{FAMILIES.key}: {family!r} is no model family: it needs a TABLE and a function describe")
    # Under this name `bridge.parameters` finds the table, in worker processes too.
    return replace(found.describe(hf_config), family=family)


def _supported(model_type: str, file: Path) -> str:
    if model_type in REFUSED:
        raise UnsupportedModel(f"{file}: model_type '{model_type}' is not supported: {REFUSED[model_type]}.")
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{file}: model_type '{model_type}' is not supported. Supported: {', '.join(FAMILIES)}. Name a family of "
            f"your own as {FAMILIES.key} (docs/extending.md)."
        )
    return model_type

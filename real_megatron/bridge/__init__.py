"""Hugging Face ↔ Megatron-Core: one table per model family drives description, conversion, export and weight sync."""

from real_megatron.bridge.description import ModelDescription, UnsupportedModel
from real_megatron.bridge.families import describe
from real_megatron.bridge.parameters import padded_vocab, parameter_count, parameters
from real_megatron.bridge.table import Parameter

__all__ = [
    "ModelDescription",
    "Parameter",
    "UnsupportedModel",
    "describe",
    "padded_vocab",
    "parameter_count",
    "parameters",
]

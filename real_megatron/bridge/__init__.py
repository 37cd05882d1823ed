"""Hugging Face ↔ Megatron-Core: one table per model family drives description, conversion, export and weight sync."""

from real_megatron.bridge.description import ModelDescription, UnsupportedModel
from real_megatron.bridge.export import export_hf
from real_megatron.bridge.families import describe
from real_megatron.bridge.hf_reader import CheckpointError, HFCheckpoint
from real_megatron.bridge.live import load_hf
from real_megatron.bridge.parameters import padded_vocab, parameter_count, parameters
from real_megatron.bridge.table import Parameter

__all__ = [
    "CheckpointError",
    "HFCheckpoint",
    "ModelDescription",
    "Parameter",
    "UnsupportedModel",
    "describe",
    "export_hf",
    "load_hf",
    "padded_vocab",
    "parameter_count",
    "parameters",
]

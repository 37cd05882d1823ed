"""Hugging Face ↔ Megatron-Core: one table per model family drives description, conversion, export and weight sync."""

from importlib import import_module
from typing import Any

from real_megatron.bridge.description import ModelDescription, UnsupportedModel
from real_megatron.bridge.expansion import padded_vocab, parameter_count, parameters
from real_megatron.bridge.families import describe
from real_megatron.bridge.hf_reader import CheckpointError, HFCheckpoint
from real_megatron.bridge.side_files import carry, read_config
from real_megatron.bridge.table import Parameter

# Imported on first use: conversion workers and the planner do not need Megatron-Core, nor training the converters.
_LATER = {
    "convert_hf_to_megatron": "convert",
    "convert_megatron_to_hf": "convert",
    "dry_run": "mapping",
    "export_hf": "export",
    "load_hf": "live",
    "print_mapping": "mapping",
}

__all__ = [
    "CheckpointError",
    "HFCheckpoint",
    "ModelDescription",
    "Parameter",
    "UnsupportedModel",
    "carry",
    "describe",
    "padded_vocab",
    "parameter_count",
    "parameters",
    "read_config",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

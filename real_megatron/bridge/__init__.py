"""Hugging Face ↔ Megatron-Core: one table per model family drives description, conversion, export and weight sync."""

from importlib import import_module
from typing import Any

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import padded_vocab, parameter_count, parameters
from real_megatron.bridge.families import Family, describe, register_family
from real_megatron.bridge.placement import ParallelLayout, check_layout
from real_megatron.bridge.table import Parameter

# Imported on first use: conversion does not need Megatron-Core, training does not need the converters.
_LATER = {
    "convert_hf_to_megatron": "convert",
    "convert_megatron_to_hf": "convert",
    "dry_run": "mapping",
    "export_hf": "export",
    "load_hf": "live",
    "side_directory": "convert",
}

__all__ = [
    "Family",
    "ModelDescription",
    "ParallelLayout",
    "Parameter",
    "check_layout",
    "describe",
    "padded_vocab",
    "parameter_count",
    "parameters",
    "register_family",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)

"""Hugging Face ↔ Megatron-Core: one table per model family drives description, conversion, export and weight sync."""

from real_megatron.bridge.description import ModelDescription, UnsupportedModel
from real_megatron.bridge.families import describe

__all__ = ["ModelDescription", "UnsupportedModel", "describe"]

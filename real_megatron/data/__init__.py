"""Judge data: published data sets and plain JSONL, prompt templates, prompts and supervised targets as tokens."""

from real_megatron.data.encode import (
    EncodedGroups,
    EncodedPrompts,
    encode_prompt,
    encode_prompts,
    encode_target,
    encode_targets,
    fit_prompt,
)
from real_megatron.data.example import JudgeExample
from real_megatron.data.formats import BadRecord, Record, register_format
from real_megatron.data.load import example_from_record, label_column, load_examples
from real_megatron.data.template import Template, is_built_in, load_template

__all__ = [
    "BadRecord",
    "EncodedGroups",
    "EncodedPrompts",
    "JudgeExample",
    "Record",
    "Template",
    "encode_prompt",
    "encode_prompts",
    "encode_target",
    "encode_targets",
    "example_from_record",
    "fit_prompt",
    "is_built_in",
    "label_column",
    "load_examples",
    "load_template",
    "register_format",
]

"""The small files of a Hugging Face checkpoint: configuration, tokenizer, generation settings, licence, and the run
that made it."""

import json
import logging
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers import __version__ as VERSION
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from real_megatron.errors import MissingCheckpoint, UnsupportedModel
from real_megatron.hf.rotary import HEAD_DIM_HINT, check_rotary

log = logging.getLogger(__name__)

TEMPLATE_FILE = "prompt_template.txt"
"""The prompt template that a run has trained with, where it was the user's own."""

# Subfolder of a converted Megatron checkpoint that holds them, so that it can be converted back without its source.
FOLDER = "hf"
RUN_FILE = "real_megatron.yaml"
"""The resolved configuration of the run that made the weights, beside them: how the judge is asked."""
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",  # Mistral's own format, which transformers reads where mistral-common is installed
    "chat_template*",
    TEMPLATE_FILE,
    "additional_chat_templates/*",  # those besides the default one, which transformers reads by name
    "*processor_config.json",  # of images and audio: a judge reads texts, but the checkpoint may have other readers
    "LICENSE*",
    "NOTICE*",
    RUN_FILE,
)


def carry(source: Path, target: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Copy the side files of a checkpoint; `dtype`, if given, is written to config.json. Returns their names.

    Other files (weights in other formats, code) are not copied, but logged.
    """
    target.mkdir(parents=True, exist_ok=True)
    found = [*source.iterdir(), *source.glob("additional_chat_templates/*")]
    files = sorted(path.relative_to(source).as_posix() for path in found if path.is_file())
    names = [name for name in files if any(fnmatch(name, pattern) for pattern in PATTERNS)]
    others = [name for name in files if name not in names and not fnmatch(name, "model*.safetensors*")]
    if others:
        log.info("%s: not carried over: %s", source, ", ".join(others))
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if dtype is not None:
        _set_dtype(target / "config.json", dtype)
    return names


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration in `config.json`; remote code is never run.

    Raises MissingCheckpoint if it cannot be used, UnsupportedModel as `check_rotary` and for two rotary settings.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise MissingCheckpoint(f"{file} is missing")
    raw = _raw(file)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        config.to_json_string()  # which every model does as it is loaded
    except Exception as error:  # each class checks its own fields
        reason = str(error.args[0] if isinstance(error, KeyError) else error)
        if "validate_rope" in reason and "*: 'NoneType'" in reason:
            reason += f"; {HEAD_DIM_HINT}"
        raise MissingCheckpoint(f"{file} cannot be used: {' '.join(reason.split())}") from error
    _refuse_two_rotary_settings(file, raw)
    check_rotary(config)
    return config


_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "sliding_window"),
)
_COPY = "copy it again from where the model is from"


def _raw(file: Path) -> dict[str, Any]:
    """What config.json says. Raises MissingCheckpoint where it is no JSON object, of a type of model that transformers
    has not itself, or has sizes that are none."""
    try:
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MissingCheckpoint(f"{file}: not valid JSON ({error}); {_COPY}") from None
    if not isinstance(raw, dict):
        raise MissingCheckpoint(f"{file}: no JSON object; {_COPY}")
    kind = raw.get("model_type")
    if kind is not None and kind not in CONFIG_MAPPING:
        own = " and its own code (auto_map) is never run" if "auto_map" in raw else ""
        raise MissingCheckpoint(
            f"{file}: model_type {kind!r} is unknown to transformers {VERSION}{own}; take a model that it has, or "
            "another version of it"
        )
    for key in _SIZES:
        size = raw.get(key)
        if isinstance(size, int) and size < 1:
            raise MissingCheckpoint(f"{file}: {key} is {size}, where a number from 1 on is needed; {_COPY}")
    return raw


def _refuse_two_rotary_settings(file: Path, raw: dict[str, Any]) -> None:
    """transformers takes `rope_scaling` in place of the whole of `rope_parameters`, and so forgets its `rope_theta`."""
    if raw.get("rope_scaling") and raw.get("rope_parameters") and raw["rope_scaling"] != raw["rope_parameters"]:
        raise UnsupportedModel(
            f"{file}: it has both rope_parameters and rope_scaling, of which transformers reads the latter alone, "
            "without the former's rope_theta: write all rotary settings into rope_parameters and remove rope_scaling"
        )


def _set_dtype(file: Path, dtype: torch.dtype) -> None:
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    # transformers 4 writes "torch_dtype", 5 writes "dtype"; older readers know only the former.
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key) != name:
        config[key] = name
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

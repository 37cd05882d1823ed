"""A checkpoint as transformers' model, every weight from its files."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from real_megatron.errors import CheckpointError, UnsupportedModel
from real_megatron.hf.checkpoint import HFCheckpoint
from real_megatron.hf.side_files import read_config

logger = logging.getLogger(__name__)


def load_model(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a Hugging Face checkpoint, on the host; remote code is never run.

    Raises CheckpointError for a checkpoint that is damaged or not complete (transformers alone would fill what is
    missing with random numbers), UnsupportedModel for quantised weights, and as `read_config` and `HFCheckpoint`.
    """
    config = read_config(Path(directory))
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"{Path(directory) / 'config.json'}: quantization_config: quantised weights are not supported here; "
            "convert the checkpoint to bfloat16 or float32 first"
        )
    HFCheckpoint(directory)  # names the file that is damaged
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are named below
            output_loading_info=True,
        )
    except Exception as error:  # what a model's class raises for fields that do not fit together
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{directory}: transformers cannot load the model: {reason}; compare config.json with the model's source"
        ) from error
    for what, names in (
        ("is missing", found["missing_keys"]),
        ("has another shape than config.json says", [name for name, *_ in found["mismatched_keys"]]),
    ):
        if names:
            more = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
            raise CheckpointError(f"{directory}: tensor '{min(names)}' {what}{more}")
    if found["unexpected_keys"]:
        names = sorted(found["unexpected_keys"])
        logger.warning("%s: %d tensors are not part of this model and left out: %s", directory, len(names), names[:3])
    loaded: PreTrainedModel = model
    return loaded

"""A checkpoint as transformers' model, every weight from its files."""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from real_megatron.errors import CheckpointError
from real_megatron.hf.checkpoint import weight_files
from real_megatron.hf.side_files import read_config

logger = logging.getLogger(__name__)


def load_model(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a Hugging Face checkpoint, on the host; remote code is never run.

    Raises CheckpointError for a checkpoint that is damaged or not complete (transformers alone would fill what is
    missing with random numbers), and as `read_config` and `weight_files`.
    """
    config = read_config(Path(directory))
    weight_files(Path(directory))
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
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: its weights cannot be loaded: {error}") from error
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

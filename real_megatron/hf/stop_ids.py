"""The tokens at which a checkpoint's responses end."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from real_megatron.errors import CheckpointError


def stop_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every end-of-sequence token that `generation_config.json`, `config.json` or the tokenizer names, ascending.

    They differ: Llama 3 lists <|end_of_text|>, <|eom_id|> and <|eot_id|> in the first alone. Only what the files say
    counts, not the defaults of transformers' classes. Raises CheckpointError for a file that is damaged.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.is_file():
            ids.update(_listed(file))
    return sorted(ids)


def _listed(file: Path) -> list[int]:
    try:
        named: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
    listed = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(item) is int for item in listed):
        raise CheckpointError(f"{file}: eos_token_id is {named!r}: write a token id, or a list of them")
    return listed

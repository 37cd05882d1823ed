"""A checkpoint by its directory or by its name on the hub, and its tokenizer."""

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from real_megatron.errors import MissingCheckpoint
from real_megatron.hf.side_files import PATTERNS, read_config

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# With PATTERNS, what is downloaded: never code or pickles.
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
# Sets of weights that are no part of the checkpoint (hf/checkpoint.py): Mistral's own format, adapters, and what lies
# in subfolders. They can be as large as the checkpoint. Additional chat templates lie in a subfolder too.
_NOT_READ = ["consolidated*", "adapter_*", *(f"*/*.{kind}" for kind in ("safetensors", "json", "model", "tiktoken"))]
# One of them holds a tokenizer's vocabulary. Without any, transformers may build an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "tokenizer.model.*", "vocab*", "*.tiktoken", "tekken.json")


def checkpoint_directory(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The directory of a Hugging Face checkpoint: `path` itself, or that of its download from the hub.

    path: a directory, or a name on the hub (`owner/name`) if it is a string and there is no directory of that name.
    revision: branch, tag or commit on the hub; None: its main branch. weights: false downloads only configuration and
    tokenizer. Downloads are kept in huggingface_hub's cache, from which they are read without a network.

    Raises MissingCheckpoint if there is neither, if config.json is missing, or for a revision of a local directory.
    """
    directory = Path(path)
    if not directory.is_dir():
        if isinstance(path, Path) or not _HUB_NAME.fullmatch(path):
            raise MissingCheckpoint(f"{path}: no such directory; name the directory of a Hugging Face checkpoint")
        directory = _download(str(path), revision, weights)
    elif revision is not None:
        raise MissingCheckpoint(f"{path} is a directory here, without a revision {revision!r}: leave the revision out")
    if not (directory / "config.json").is_file():
        if (directory / ".metadata").is_file():
            raise MissingCheckpoint(
                f"{path} is a Megatron checkpoint: make a Hugging Face checkpoint of it with `real-megatron convert "
                f"to-hf {path} OUTPUT`, and name OUTPUT"
            )
        if (directory / "hf/config.json").is_file():
            raise MissingCheckpoint(f"{path}: no config.json there; did you mean {directory / 'hf'}?")
        raise MissingCheckpoint(f"{path}: no config.json there; name the directory of a Hugging Face checkpoint")
    return directory


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face checkpoint; remote code is never run.

    It may have tokens beyond the model's vocabulary (see `check_vocabulary`). Raises MissingCheckpoint without one,
    CheckpointError as `read_config`.
    """
    directory = Path(directory)
    if not any(any(directory.glob(pattern)) for pattern in _VOCABULARIES):
        raise MissingCheckpoint(
            f"{directory} has no tokenizer: none of {', '.join(_VOCABULARIES)} is there; copy the tokenizer's files "
            "from the model that the checkpoint was made from"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        if (directory / "config.json").is_file():
            read_config(directory)  # transformers reads it for the tokenizer's class: it may be what is damaged
        raise MissingCheckpoint(
            f"{directory}: its tokenizer cannot be loaded: {error}; copy its files again from where the model is from"
        ) from error
    return tokenizer


def check_vocabulary(directory: Path, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int] | None = None) -> None:
    """Raise MissingCheckpoint where a token is beyond the model's vocabulary: its embedding would be padding in
    training, and out of range elsewhere. (Fewer tokens than rows are normal.)

    ids: the tokens that matter; None: all. Gemma 3's tokenizer has one for images, which its text models lack.
    """
    rows = getattr(read_config(directory).get_text_config(), "vocab_size", None)
    last = max(tokenizer.get_vocab().values() if ids is None else ids, default=0)
    if rows is not None and last >= rows:
        raise MissingCheckpoint(
            f"{directory}: the tokenizer's token {tokenizer.convert_ids_to_tokens(last)!r} has the id {last}, but the "
            f"model's vocab_size in config.json is {rows}: take the tokenizer that belongs to the model, or enlarge "
            "the model (transformers' model.resize_token_embeddings(len(tokenizer))) and save both together"
        )


def _download(name: str, revision: str | None, weights: bool) -> Path:
    at = f" at revision {revision!r}" if revision else ""
    wanted = [*PATTERNS, *_WEIGHTS] if weights else [*PATTERNS]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=_NOT_READ))
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise MissingCheckpoint(
            f"{name}: no directory here, and the hub has no such model{at} (or it is private or gated: log in with "
            "`hf auth login`); correct the name or the revision"
        ) from None
    except Exception as error:  # besides OSError: errors of its HTTP client, which differ between its versions
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise MissingCheckpoint(
            f"{name}: no directory here, and it cannot be downloaded from the hub{at} ({reason}); without a network, "
            "download it elsewhere (`hf download`) and name its directory"
        ) from None

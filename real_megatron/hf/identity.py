"""Which model a directory holds, as digests of its files that are cheap for a model of any size."""

import hashlib
from fnmatch import fnmatch
from pathlib import Path

from real_megatron.hf.checkpoint import INDEX, weight_files
from real_megatron.hf.side_files import PATTERNS, RUN_FILE

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are read whole."""
SAMPLES, SAMPLE_BYTES = 16, 64 * 2**10
"""Of larger ones: so many samples of so many bytes, evenly spaced, the last one at the end."""


def model_files(directory: Path) -> dict[str, str]:
    """The digest of each file of a Hugging Face checkpoint that decides what it computes: configuration, tokenizer,
    weights; by name. Two directories with equal digests hold the same model, wherever they are.

    Small files are read whole. Of a large file of weights the digest covers the size, the safetensors header (every
    tensor's name, dtype, shape and place) and 16 samples of 64 KiB, not each value. Raises OSError, and as
    `weight_files`.
    """
    wanted = [pattern for pattern in PATTERNS if not pattern.startswith(("LICENSE", "NOTICE", RUN_FILE))]
    wanted.append(INDEX)
    names = {path.name for path in directory.iterdir() if path.is_file()}
    names = {name for name in names if any(fnmatch(name, pattern) for pattern in wanted)}
    names |= {path.name for path in weight_files(directory)}
    return {name: file_digest(directory / name) for name in sorted(names)}


def file_digest(path: Path, whole: int = WHOLE_BYTES) -> str:
    """A digest of a file: of all of it up to `whole` bytes, else as of large weights in `model_files`."""
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= whole:
            digest.update(file.read())
            return digest.hexdigest()
        header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
        digest.update(file.read(min(header, whole)))
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

"""Reading a Hugging Face checkpoint directory: no tensor missing or unknown, and only the needed blocks are read.

Format: `model.safetensors`, or several files listed in `model.safetensors.index.json` (https://huggingface.co/docs/safetensors).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from real_megatron.errors import CheckpointError

Shape = tuple[int, ...]
Range = tuple[int, int]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Files are memory-mapped; what has been read counts as resident until the mapping is closed.
REMAP_BYTES = 32 * 2**20


class Entry(NamedTuple):
    """Where a tensor is stored, and how."""

    file: Path
    shape: Shape
    dtype: torch.dtype


class HFCheckpoint:
    """The tensors of a Hugging Face checkpoint directory.

    Reads every file's header; raises CheckpointError if a file is missing or damaged, or if the index does not agree
    with the files. Can be pickled: worker processes open the files again.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, Any] = {}
        self._read_bytes = 0
        index = self.directory / INDEX
        listed = _read_index(index) if index.exists() else None
        for file in self._files(listed):
            for name, entry in _read_header(file):
                if name in self.entries:
                    raise CheckpointError(f"{file}: tensor '{name}' is also in {self.entries[name].file.name}")
                if listed is not None and listed.get(name) != file.name:
                    raise CheckpointError(f"{file}: tensor '{name}' is not listed for this file in {INDEX}")
                self.entries[name] = entry
        for name, listed_file in (listed or {}).items():
            if name not in self.entries:
                raise CheckpointError(
                    f"{self.directory / listed_file}: tensor '{name}' is missing, though {INDEX} lists it"
                )

    def _files(self, listed: dict[str, str] | None) -> list[Path]:
        if listed is not None:
            files = [self.directory / name for name in sorted(set(listed.values()))]
            for file in files:
                if not file.is_file():
                    lost = next(name for name, where in listed.items() if where == file.name)
                    raise CheckpointError(f"{file} is missing; {INDEX} places tensor '{lost}' and others there")
            return files
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        if any(self.directory.glob("*.bin")):
            raise CheckpointError(f"{self.directory} holds pickled .bin weights only; save the model as safetensors")
        raise CheckpointError(f"{self.directory}: neither {SINGLE} nor {INDEX} found")

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor by name."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def validate(self, expected: Mapping[str, Shape], tied: bool) -> None:
        """Check that exactly the tensors `expected` (name → shape) are there; else raise CheckpointError.

        Rotary frequencies, which old checkpoints hold, are ignored. So is the output layer of a model with tied
        embeddings, if it equals them.
        """
        for name, shape in expected.items():
            if name not in self.entries:
                raise CheckpointError(f"{self.directory}: tensor '{name}' is missing")
            entry = self.entries[name]
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' has shape {entry.shape}, but config.json asks for {shape}"
                )
        for name, entry in self.entries.items():
            if name in expected or name.endswith("rotary_emb.inv_freq"):
                continue
            if tied and name == "lm_head.weight":
                self._require_equal(name, "model.embed_tokens.weight")
            else:
                raise CheckpointError(f"{entry.file}: tensor '{name}' is not part of this model")

    def _require_equal(self, name: str, other: str, rows: int = 8192) -> None:
        entry = self.entries[name]
        same = entry.shape == self.entries[other].shape and all(
            torch.equal(self.block(name, (row, row + rows)), self.block(other, (row, row + rows)))
            for row in range(0, entry.shape[0], rows)
        )
        if not same:
            raise CheckpointError(
                f"{entry.file}: tensor '{name}' differs from '{other}', but config.json ties them; "
                "set tie_word_embeddings to false there if the output layer is its own"
            )

    def block(self, name: str, rows: Range, columns: Range | None = None) -> torch.Tensor:
        """Rows and columns (default: all) of a tensor, on the CPU, in the stored dtype."""
        stored = self._open(self.entries[name].file).get_slice(name)
        tensor = stored[slice(*rows)] if columns is None else stored[slice(*rows), slice(*columns)]
        self._read_bytes += tensor.nbytes
        return tensor

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return self.block(name, (0, self.entries[name].shape[0]))

    def _open(self, file: Path) -> Any:
        if self._read_bytes > REMAP_BYTES:
            self._handles.clear()
            self._read_bytes = 0
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}, "_read_bytes": 0}


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        outside = [name for name, file in weight_map.items() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}") from error
    for name in outside:
        raise CheckpointError(f"{index}: tensor '{name}' points outside the directory: {weight_map[name]}")
    return weight_map


def _read_header(file: Path) -> Iterable[tuple[str, Entry]]:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                stored = handle.get_slice(name)
                dtype = stored.get_dtype()
                if dtype not in DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor '{name}' has dtype {dtype}; supported: {', '.join(DTYPES)}. "
                        "Quantised weights must be converted first"
                    )
                yield name, Entry(file, tuple(stored.get_shape()), DTYPES[dtype])
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error

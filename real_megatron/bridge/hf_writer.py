"""Writing Hugging Face safetensors files one tensor at a time.

Format (https://huggingface.co/docs/safetensors): an 8-byte little-endian length, a JSON header with dtype, shape and
byte range of every tensor, then the bytes. The whole header follows from the parameter table, so it is written
first and the tensors are streamed after it, or, where they come in another order, put into their places.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from real_megatron.bridge.table import Parameter
from real_megatron.hf.checkpoint import DTYPES, INDEX, SINGLE, Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class CheckpointFile:
    """One file and the parameters whose Hugging Face tensors it holds, with their dtypes."""

    name: str
    parameters: tuple[Parameter, ...]
    dtypes: tuple[torch.dtype, ...]

    def tensors(self) -> Iterator[tuple[str, Shape, torch.dtype]]:
        """Name, shape and dtype of the tensors in file order."""
        for parameter, dtype in zip(self.parameters, self.dtypes, strict=True):
            for name, shape in parameter.hf_shapes.items():
                yield name, shape, dtype


def plan_files(parameters: Sequence[Parameter], dtypes: Sequence[torch.dtype], max_bytes: int) -> list[CheckpointFile]:
    """Fill files of up to `max_bytes` in order. The tensors of one parameter stay together, whatever their size."""
    groups: list[list[int]] = []
    filled = 0
    for i, (parameter, dtype) in enumerate(zip(parameters, dtypes, strict=True)):
        size = parameter.hf_numel * dtype.itemsize
        if not groups or filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    total = len(groups)
    return [
        CheckpointFile(
            SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            tuple(parameters[i] for i in group),
            tuple(dtypes[i] for i in group),
        )
        for number, group in enumerate(groups, 1)
    ]


def write_index(directory: Path, files: Sequence[CheckpointFile]) -> None:
    """`model.safetensors.index.json`, unless a single file needs none."""
    if len(files) == 1:
        return
    tensors = [(file.name, *tensor) for file in files for tensor in file.tensors()]
    total = sum(prod(shape) * dtype.itemsize for _, _, shape, dtype in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, name, _, _ in tensors}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class SafetensorsStream:
    """Writes one file; `write` takes the tensors in the file's order, each whole or a few rows at a time."""

    def __init__(self, directory: Path, file: CheckpointFile) -> None:
        self._expected = list(file.tensors())
        self._position, self._row = 0, 0
        self._file = (directory / file.name).open("wb")
        self._file.write(_header(file))

    def write(self, tensor: torch.Tensor) -> None:
        """Append a tensor or its next rows, converted to the file's dtype. Raises ValueError for a wrong shape."""
        name, shape, dtype = self._expected[self._position]
        if tuple(tensor.shape[1:]) != shape[1:] or self._row + tensor.shape[0] > shape[0]:
            raise ValueError(f"tensor '{name}' has rows {tuple(tensor.shape)} beyond row {self._row} of {shape}")
        self._file.write(_bytes(tensor, dtype))
        self._row += tensor.shape[0]
        if self._row == shape[0]:
            self._position, self._row = self._position + 1, 0

    def close(self) -> None:
        """Flush to disk. Raises ValueError when tensors are missing."""
        if self._position < len(self._expected):
            raise ValueError(f"{self._file.name}: tensor '{self._expected[self._position][0]}' was not written")
        _close(self._file)


class PlacedTensors:
    """Writes files whose tensors come whole and in any order: a file's layout is that of its header all the same."""

    def __init__(self, directory: Path, files: Sequence[CheckpointFile]) -> None:
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int, Shape, torch.dtype]] = {}
        for file in files:
            opened = (directory / file.name).open("wb")
            self._files.append(opened)
            start = opened.write(_header(file))
            for name, shape, dtype in file.tensors():
                self._places[name] = (opened, start, shape, dtype)
                start += prod(shape) * dtype.itemsize

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor into its place, converted to its file's dtype. Raises ValueError for one that has no place or
        was written before, and for a wrong shape."""
        if name not in self._places:
            raise ValueError(f"tensor '{name}' is in none of the files, or was written before")
        file, start, shape, dtype = self._places[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"tensor '{name}' has shape {tuple(tensor.shape)}, its file a place for {shape}")
        del self._places[name]
        file.seek(start)
        file.write(_bytes(tensor, dtype))

    def close(self) -> None:
        """Flush to disk. Raises ValueError when tensors are missing."""
        for name, (file, *_) in self._places.items():
            raise ValueError(f"{file.name}: tensor '{name}' was not written")
        for file in self._files:
            _close(file)


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _header(file: CheckpointFile) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in file.tensors():
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

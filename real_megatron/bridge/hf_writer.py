"""Writing Hugging Face safetensors shards one tensor at a time.

Format (https://huggingface.co/docs/safetensors): an 8-byte little-endian length, a JSON header with dtype, shape and
byte range of every tensor, then the bytes. All of the header follows from the parameter table, so that it can be
written first and the tensors streamed behind it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from real_megatron.bridge.hf_reader import DTYPES, INDEX, SINGLE
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.transforms import Shape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One file and the parameters whose Hugging Face tensors it holds, with their dtypes."""

    file: str
    parameters: tuple[Parameter, ...]
    dtypes: tuple[torch.dtype, ...]

    def tensors(self) -> Iterator[tuple[str, Shape, torch.dtype]]:
        """Name, shape and dtype of the tensors in file order."""
        for parameter, dtype in zip(self.parameters, self.dtypes, strict=True):
            for name, shape in parameter.hf_shapes.items():
                yield name, shape, dtype


def plan_shards(parameters: Sequence[Parameter], dtypes: Sequence[torch.dtype], max_bytes: int) -> list[Shard]:
    """Fill files of up to `max_bytes` in order; the tensors of one parameter stay together."""
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
        Shard(
            SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors",
            tuple(parameters[i] for i in group),
            tuple(dtypes[i] for i in group),
        )
        for number, group in enumerate(groups, 1)
    ]


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """`model.safetensors.index.json`, unless a single file needs none."""
    if len(shards) == 1:
        return
    tensors = [(shard.file, *tensor) for shard in shards for tensor in shard.tensors()]
    total = sum(prod(shape) * dtype.itemsize for _, _, shape, dtype in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, name, _, _ in tensors}}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


class SafetensorsStream:
    """Writes one shard; `write` takes the tensors in the shard's order, each whole or in runs of rows."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self._expected = list(shard.tensors())
        self._position, self._row = 0, 0
        self._file = (directory / shard.file).open("wb")
        self._file.write(_header(shard))

    def write(self, tensor: torch.Tensor) -> None:
        """Append a tensor or its next rows, converted to the shard's dtype. Raises ValueError for a wrong shape."""
        name, shape, dtype = self._expected[self._position]
        if tuple(tensor.shape[1:]) != shape[1:] or self._row + tensor.shape[0] > shape[0]:
            raise ValueError(f"tensor '{name}' has rows {tuple(tensor.shape)} beyond row {self._row} of {shape}")
        data = tensor.to(dtype).contiguous()
        self._file.write(memoryview(data.view(-1).view(torch.uint8).numpy()))
        self._row += tensor.shape[0]
        if self._row == shape[0]:
            self._position, self._row = self._position + 1, 0

    def close(self) -> None:
        """Flush to disk. Raises ValueError when tensors are missing."""
        if self._position < len(self._expected):
            raise ValueError(f"{self._file.name}: tensor '{self._expected[self._position][0]}' was not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _header(shard: Shard) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape, dtype in shard.tensors():
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

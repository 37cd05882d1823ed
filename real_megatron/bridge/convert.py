"""Offline conversion between Hugging Face and Megatron `torch_dist` checkpoints, streaming, in parallel processes.

A process holds one tensor at a time with its source, so memory is bounded by the largest tensors, not by the model.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from real_megatron.bridge import side_files, torch_dist
from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import padded_vocab, parameters
from real_megatron.bridge.families import describe
from real_megatron.bridge.hf_reader import CheckpointError, HFCheckpoint
from real_megatron.bridge.hf_writer import SafetensorsStream, Shard, plan_shards, write_index
from real_megatron.bridge.layout import Layout, Location, extra_states, locations, stacks_layers
from real_megatron.bridge.staging import staged_directory
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.torch_dist import Block, TorchDistCheckpoint
from real_megatron.bridge.transforms import Piece, Shape
from real_megatron.bridge.workers import Progress, run

# A rank's share is cut into files of about this size, so that processes can share the work.
FILE_BYTES = 2 * 2**30
# Larger blocks are stored as several, so that no process ever holds much at once.
BLOCK_BYTES = 16 * 2**20
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    output: Path
    parameters: int
    bytes: int
    files: int
    seconds: float


def convert_hf_to_megatron(
    hf_path: str | Path,
    output: str | Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 64,
    workers: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Write a Hugging Face checkpoint as a Megatron distributed checkpoint.

    The result can be loaded at every layout; tp, pp and ep decide how it is cut into blocks and files, so that ranks
    at that layout read little more than their own. The vocabulary is padded to a multiple of `vocab_multiple` × tp.
    dtype: None keeps the stored one. The configuration and tokenizer files go to the subfolder `hf`.

    Raises CheckpointError for a partial or damaged source, UnsupportedModel, ValueError for a layout that does not
    divide the model, FileExistsError for an output that exists. `output` appears only when it is complete.
    """
    start = time.monotonic()
    hf_path = Path(hf_path)
    description = describe(side_files.read_config(hf_path))
    layout = Layout(tp, pp, ep)
    check_layout(description, layout)
    table = parameters(description, vocab_rows=padded_vocab(description, tp, vocab_multiple))
    source = HFCheckpoint(hf_path)
    source.validate(table, description.tied)
    dtypes = [dtype] * len(table) if dtype else _stored_dtypes(table, source, description)
    job = _ToMegatron(source, description, table, dtypes, Path())
    files = _plan_files(table, dtypes, layout, description)
    total = sum(prod(piece.shape) * dtypes[i].itemsize for file in files for i, piece in file.blocks)
    with staged_directory(output) as staging:
        side_files.carry(hf_path, staging / side_files.FOLDER, dtype)
        job.directory = staging
        written = run(job, files, total, workers or _default_workers(), "HF → Megatron", progress)
        torch_dist.finish(staging, written)
    return Conversion(Path(output), _count(table), total, len(files), time.monotonic() - start)


def convert_megatron_to_hf(
    megatron_path: str | Path,
    output: str | Path,
    *,
    hf_path: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    workers: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Write the model of a Megatron `torch_dist` checkpoint, of any layout, as a Hugging Face checkpoint.

    hf_path: where config.json and the tokenizer are; default: the subfolder `hf` that `convert_hf_to_megatron` made.
    Optimizer state in the checkpoint is left aside. dtype: None keeps the stored one. Raises as the other direction.
    """
    start = time.monotonic()
    megatron_path = Path(megatron_path)
    side = Path(hf_path) if hf_path is not None else megatron_path / side_files.FOLDER
    description = describe(side_files.read_config(side))
    source = TorchDistCheckpoint(megatron_path)
    table, places = _locate(source, description)
    dtypes = [dtype or source.tensors[place.key].properties.dtype for place in places]
    shards = plan_shards(table, dtypes, max_shard_bytes)
    total = sum(parameter.hf_numel * d.itemsize for parameter, d in zip(table, dtypes, strict=True))
    job = _ToHF(source, {p.name: place for p, place in zip(table, places, strict=True)}, Path())
    with staged_directory(output) as staging:
        side_files.carry(side, staging, _one_dtype(dtypes))
        job.directory = staging
        run(job, shards, total, workers or _default_workers(), "Megatron → HF", progress)
        write_index(staging, shards)
    return Conversion(Path(output), _count(table), total, len(shards), time.monotonic() - start)


def check_layout(description: ModelDescription, layout: Layout) -> None:
    """Raise ValueError when the parallel sizes do not divide the model."""
    if layout.ep > 1 and not description.num_experts:
        raise ValueError(f"ep={layout.ep} is for models with experts; this one has no experts")
    if layout.ep > 1 and description.num_experts % layout.ep:
        raise ValueError(f"ep={layout.ep} does not divide the {description.num_experts} experts of this model")
    if description.num_layers % layout.pp:
        raise ValueError(f"pp={layout.pp} does not divide the {description.num_layers} layers of this model")
    if description.num_groups % layout.tp and layout.tp % description.num_groups:
        raise ValueError(f"tp={layout.tp} is neither a divisor nor a multiple of {description.num_groups} query groups")
    for parameter in parameters(description, vocab_rows=padded_vocab(description, layout.tp, 1)):
        try:
            parameter.transform.pieces(0, layout.tp)
        except ValueError as error:
            raise ValueError(f"tp={layout.tp} does not divide '{parameter.name}': {error}") from error


@dataclass
class _FileTask:
    """One output file: (position in the table, piece) of each block, and objects written beside them."""

    prefix: str
    blocks: list[tuple[int, Piece]]
    objects: list[str]


def _plan_files(
    table: Sequence[Parameter], dtypes: Sequence[torch.dtype], layout: Layout, description: ModelDescription
) -> list[_FileTask]:
    stacked = stacks_layers(description)
    open_files: dict[int, _FileTask] = {}
    filled: dict[int, int] = {}
    tasks: list[_FileTask] = []
    for i, (parameter, dtype) in enumerate(zip(table, dtypes, strict=True)):
        first = True
        for tp_rank, piece in layout.blocks(parameter):
            rank = layout.rank_of(parameter, tp_rank, description)
            size = prod(piece.shape) * dtype.itemsize
            if rank not in open_files or filled[rank] + size > FILE_BYTES:
                number = sum(task.prefix.startswith(f"__{rank}_") for task in tasks)
                open_files[rank] = _FileTask(f"__{rank}_{number}_", [], [])
                filled[rank] = 0
                tasks.append(open_files[rank])
            open_files[rank].blocks.extend((i, part) for part in piece.by_rows(BLOCK_BYTES // dtype.itemsize))
            filled[rank] += size
            if first:
                for location in locations(parameter, description, stacked):
                    open_files[rank].objects.extend(extra_states(parameter, location))
            first = False
    return tasks


@dataclass
class _ToMegatron:
    """Writes one file of a Megatron checkpoint."""

    source: HFCheckpoint
    description: ModelDescription
    table: list[Parameter]
    dtypes: list[torch.dtype]
    directory: Path

    def __call__(self, task: _FileTask, progress: Progress) -> Any:
        stacked = stacks_layers(self.description)
        blocks, origins = [], {}
        for i, piece in task.blocks:
            parameter = self.table[i]
            for copy, place in enumerate(locations(parameter, self.description, stacked)):
                sizes: Shape = (*(1 for _ in place.index), *piece.shape)
                block = Block(place.key, place.shape(parameter), place.offset(piece), sizes, self.dtypes[i])
                blocks.append(block)
                origins[block.index] = (parameter, piece, self.dtypes[i], copy)

        def produce(index: Any) -> torch.Tensor:
            parameter, piece, dtype, copy = origins[index]
            if copy == 0:
                progress(prod(piece.shape) * dtype.itemsize)
            return parameter.transform.read(piece, self.source.reader(parameter)).to(dtype)

        return torch_dist.write_file(self.directory, task.prefix, blocks, task.objects, produce)


@dataclass
class _ToHF:
    """Writes one shard of a Hugging Face checkpoint."""

    source: TorchDistCheckpoint
    places: dict[str, Location]
    directory: Path

    def __call__(self, shard: Shard, progress: Progress) -> None:
        stream = SafetensorsStream(self.directory, shard)
        for parameter in shard.parameters:
            for rows in self._rows(parameter, self.places[parameter.name]):
                stream.write(rows)
                progress(rows.nbytes)
        stream.close()

    def _rows(self, parameter: Parameter, place: Location) -> Iterator[torch.Tensor]:
        transform = parameter.transform
        if transform.hf_starts is None:
            yield from transform.split(self.source.read(place.key, place.index))
            return
        for start, shape in zip(transform.hf_starts, transform.hf_shapes, strict=True):
            yield from self.source.row_blocks(place.key, place.index, (start, start + shape[0]))


def _locate(source: TorchDistCheckpoint, description: ModelDescription) -> tuple[list[Parameter], list[Location]]:
    """The parameter table at the checkpoint's vocabulary padding, and where each entry is stored."""
    tensors = source.tensors
    embedding = "embedding.word_embeddings.weight"
    if embedding not in tensors:
        raise CheckpointError(f"{source.directory}: tensor '{embedding}' is missing")
    table = parameters(description, vocab_rows=tensors[embedding].size[0])
    if tensors[embedding].size[0] < description.vocab_size:
        raise CheckpointError(
            f"{source.directory}: tensor '{embedding}' has {tensors[embedding].size[0]} rows, "
            f"fewer than the {description.vocab_size} tokens of config.json"
        )
    places = []
    for parameter in table:
        options = [o for stacked in (True, False) for o in locations(parameter, description, stacked)]
        place = next((option for option in options if option.key in tensors), None)
        if place is None:
            raise CheckpointError(f"{source.directory}: tensor '{options[0].key}' is missing")
        if tuple(tensors[place.key].size) != place.shape(parameter):
            raise CheckpointError(
                f"{source.directory}: tensor '{place.key}' has shape {tuple(tensors[place.key].size)}, "
                f"but config.json asks for {place.shape(parameter)}"
            )
        places.append(place)
    known = {o.key for p in table for stacked in (True, False) for o in locations(p, description, stacked)}
    for key in tensors:
        if key.startswith(("embedding.", "decoder.", "output_layer.")) and key not in known:
            raise CheckpointError(f"{source.directory}: tensor '{key}' is not part of this model")
    return table, places


def _stored_dtypes(
    table: Sequence[Parameter], source: HFCheckpoint, description: ModelDescription
) -> list[torch.dtype]:
    """The dtype of each parameter; what is stored as one Megatron tensor must have one."""
    first: dict[str, str] = {}
    for parameter in table:
        key = locations(parameter, description, stacks_layers(description))[0].key
        for name in parameter.hf:
            entry, other = source.entries[name], source.entries[first.setdefault(key, name)]
            if entry.dtype != other.dtype:
                raise CheckpointError(
                    f"{entry.file}: tensor '{name}' is {entry.dtype}, '{first[key]}' is {other.dtype}, and Megatron "
                    "stores both as one; give a dtype to convert to"
                )
    return [source.entries[parameter.hf[0]].dtype for parameter in table]


def _one_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that config.json names: that of most parameters."""
    return max(set(dtypes), key=list(dtypes).count)


def _count(table: Sequence[Parameter]) -> int:
    return sum(parameter.hf_numel for parameter in table)


def _default_workers() -> int:
    return min(os.cpu_count() or 1, 8)

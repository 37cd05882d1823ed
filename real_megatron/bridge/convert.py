"""Offline conversion between Hugging Face and Megatron `torch_dist` checkpoints, streaming, in parallel processes.

A process holds one tensor and its source at a time: memory is bounded by the largest tensor, not by the model.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from real_megatron.bridge import torch_dist
from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import padded_vocab, parameters
from real_megatron.bridge.families import describe
from real_megatron.bridge.hf_writer import CheckpointFile, SafetensorsStream, plan_files, write_index
from real_megatron.bridge.placement import (
    Location,
    ParallelLayout,
    check_layout,
    extra_states,
    locations,
    stacks_layers,
)
from real_megatron.bridge.table import Parameter, hf_shapes
from real_megatron.bridge.torch_dist import StoredBlock, TorchDistCheckpoint
from real_megatron.bridge.transforms import Block
from real_megatron.bridge.workers import Progress, run
from real_megatron.errors import CheckpointError
from real_megatron.hf import side_files
from real_megatron.hf.checkpoint import HFCheckpoint, Shape
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.staging import check_new, staged_directory

logger = logging.getLogger(__name__)

# A rank's shard is written as files of about this size, so that several processes can write it.
MEGATRON_FILE_BYTES = 2 * 2**30
# Larger blocks are stored as several, so that a process never holds more than this of a tensor.
BLOCK_BYTES = 16 * 2**20
HF_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    output: Path
    parameters: int
    """Numbers in the Hugging Face checkpoint."""
    bytes: int
    """Of the weights."""
    files: int
    seconds: float


def convert_hf_to_megatron(
    hf_path: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    family: str = "auto",
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    dtype: torch.dtype | None = None,
    vocab_multiple: int = 64,
    workers: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Write a Hugging Face checkpoint as a Megatron distributed checkpoint.

    hf_path: a directory, or a name on the hub, there at `revision` (branch, tag or commit)
    output: appears only when it is complete; configuration and tokenizer files go to its subfolder `hf`
    family: as `model.family`
    tensor, pipeline, expert: parallel sizes, which decide how the result is divided into blocks and files, so that
        ranks at that layout read little more than their own; it can be loaded at every layout
    dtype: None keeps the stored one
    vocab_multiple: the vocabulary is padded to a multiple of it times `tensor`
    workers: number of processes; default: one per CPU core, at most 8

    Raises CheckpointError for a source that is missing, partial or damaged, UnsupportedModel, ConfigError for a layout
    that does not divide the model and for an output that another job writes, FileExistsError for one that exists.
    """
    start = time.monotonic()
    check_new(output)
    directory = checkpoint_directory(hf_path, revision)
    description = describe(side_files.read_config(directory), family)
    layout = ParallelLayout(tensor, pipeline, expert)
    check_layout(description, layout)
    table = parameters(description, vocab_rows=padded_vocab(description, tensor, vocab_multiple))
    source = HFCheckpoint(directory)
    source.validate(hf_shapes(table), description.tied)
    dtypes = [dtype] * len(table) if dtype else _stored_dtypes(table, source, description)
    job = _ToMegatron(source, description, table, dtypes, Path())
    files = _plan_files(table, dtypes, layout, description)
    total = sum(prod(block.shape) * dtypes[i].itemsize for file in files for i, block in file.blocks)
    with staged_directory(output) as staging:
        side_files.carry(directory, staging / side_files.FOLDER, dtype)
        job.directory = staging
        written = run(job, files, total, workers or _default_workers(), "HF → Megatron", progress)
        torch_dist.finish(staging, written)
    return Conversion(Path(output), _count(table), total, len(files), time.monotonic() - start)


def convert_megatron_to_hf(
    megatron_path: str | Path,
    output: str | Path,
    *,
    hf_path: str | Path | None = None,
    revision: str | None = None,
    family: str = "auto",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = HF_FILE_BYTES,
    workers: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Write the model of a Megatron `torch_dist` checkpoint, of any layout, as a Hugging Face checkpoint.

    hf_path: where config.json and the tokenizer are: a directory, or a name on the hub, there at `revision`; default:
        the subfolder `hf` that `convert_hf_to_megatron` writes
    family: as `model.family`
    dtype: None keeps the stored one
    max_file_bytes: size of a safetensors file that is exceeded only for a single parameter
    workers: as in the other direction

    Optimizer state in the checkpoint is ignored. The run configuration of the checkpoint (`real_megatron.yaml`), by
    which a judge is asked, comes along, also where hf_path is another run's. Raises what the other direction raises.
    """
    start = time.monotonic()
    check_new(output)
    megatron_path = Path(megatron_path)
    source = TorchDistCheckpoint(megatron_path)
    side = side_directory(megatron_path, hf_path, revision)
    description = describe(side_files.read_config(side), family)
    table, places = _locate(source, description)
    dtypes = [dtype or source.tensors[place.key].properties.dtype for place in places]
    files = plan_files(table, dtypes, max_file_bytes)
    total = sum(parameter.hf_numel * d.itemsize for parameter, d in zip(table, dtypes, strict=True))
    job = _ToHF(source, {p.name: place for p, place in zip(table, places, strict=True)}, Path())
    with staged_directory(output) as staging:
        side_files.carry(side, staging, _one_dtype(dtypes))
        _carry_run_file(megatron_path, staging)
        job.directory = staging
        run(job, files, total, workers or _default_workers(), "Megatron → HF", progress)
        write_index(staging, files)
    return Conversion(Path(output), _count(table), total, len(files), time.monotonic() - start)


@dataclass
class _FileTask:
    """One output file: each block with its parameter's position in the table, and keys of the empty objects."""

    prefix: str
    blocks: list[tuple[int, Block]]
    objects: list[str]


def _plan_files(
    table: Sequence[Parameter], dtypes: Sequence[torch.dtype], layout: ParallelLayout, description: ModelDescription
) -> list[_FileTask]:
    stacked = stacks_layers(description)
    open_files: dict[int, _FileTask] = {}
    filled: dict[int, int] = {}
    tasks: list[_FileTask] = []
    for i, (parameter, dtype) in enumerate(zip(table, dtypes, strict=True)):
        first = True
        for tensor_rank, block in layout.blocks(parameter):
            rank = layout.rank_of(parameter, tensor_rank, description)
            size = prod(block.shape) * dtype.itemsize
            if rank not in open_files or filled[rank] + size > MEGATRON_FILE_BYTES:
                number = sum(task.prefix.startswith(f"__{rank}_") for task in tasks)
                open_files[rank] = _FileTask(f"__{rank}_{number}_", [], [])
                filled[rank] = 0
                tasks.append(open_files[rank])
            open_files[rank].blocks.extend((i, rows) for rows in block.by_rows(BLOCK_BYTES // dtype.itemsize))
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
        stored_blocks, origins = [], {}
        for i, block in task.blocks:
            parameter = self.table[i]
            for copy, place in enumerate(locations(parameter, self.description, stacked)):
                sizes: Shape = (*(1 for _ in place.index), *block.shape)
                stored = StoredBlock(place.key, place.shape(parameter), place.offset(block), sizes, self.dtypes[i])
                stored_blocks.append(stored)
                origins[stored.index] = (parameter, block, self.dtypes[i], copy)

        def produce(index: MetadataIndex) -> torch.Tensor:
            parameter, block, dtype, copy = origins[index]
            if copy == 0:
                progress(prod(block.shape) * dtype.itemsize)
            return parameter.transform.read(block, parameter.reader(self.source)).to(dtype)

        return torch_dist.write_file(self.directory, task.prefix, stored_blocks, task.objects, produce)


@dataclass
class _ToHF:
    """Writes one file of a Hugging Face checkpoint."""

    source: TorchDistCheckpoint
    places: dict[str, Location]
    directory: Path

    def __call__(self, file: CheckpointFile, progress: Progress) -> None:
        stream = SafetensorsStream(self.directory, file)
        for parameter in file.parameters:
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


def side_directory(megatron_path: Path, hf_path: str | Path | None = None, revision: str | None = None) -> Path:
    """Where config.json and the tokenizer files of a Megatron checkpoint are; the arguments are those of
    `convert_megatron_to_hf`. Raises CheckpointError without them, as for a training checkpoint."""
    if hf_path is not None:
        return checkpoint_directory(hf_path, revision, weights=False)
    side = megatron_path / side_files.FOLDER
    if not side.is_dir():
        raise CheckpointError(
            f"{megatron_path}: no subfolder '{side_files.FOLDER}' with config.json and tokenizer; name the original "
            "Hugging Face checkpoint (hf_path, --hf): of a training checkpoint, model.path in its run's config.yaml"
        )
    return checkpoint_directory(side)


def _carry_run_file(megatron_path: Path, target: Path) -> None:
    """Put the run that made the weights beside them, and its template: that of the Megatron checkpoint, whatever run
    the files are from that have been carried from elsewhere."""
    for own in (megatron_path, megatron_path / side_files.FOLDER):
        if not (own / side_files.RUN_FILE).is_file():
            continue
        (target / side_files.TEMPLATE_FILE).unlink(missing_ok=True)
        for name in (side_files.RUN_FILE, side_files.TEMPLATE_FILE):
            if (own / name).is_file():
                shutil.copyfile(own / name, target / name)
        return
    if not (target / side_files.RUN_FILE).exists() and not (megatron_path / side_files.FOLDER).is_dir():
        logger.warning(
            "%s has no %s, which says how a judge is asked: `judge` will ask the result with the default scale, "
            "template and lengths, unless --config names the run's configuration",
            *(megatron_path, side_files.RUN_FILE),
        )


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

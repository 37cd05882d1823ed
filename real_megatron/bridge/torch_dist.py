"""Streaming access to `torch_dist` checkpoints through torch.distributed.checkpoint (DCP), tensor by tensor.

Megatron's own save and load hold a whole model. Here DCP's file writer asks for each tensor at the moment it is
written, and DCP's file reader fills one buffer at a time.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from real_megatron.bridge.dcp_metadata import read_metadata
from real_megatron.errors import CheckpointError
from real_megatron.hf.checkpoint import Range, Shape

Produce = Callable[[MetadataIndex], torch.Tensor]
"""The tensor of a block, by DCP's name for it."""
CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class StoredBlock:
    """A block of a stored tensor, to be written."""

    key: str
    shape: Shape
    offset: Shape
    sizes: Shape
    dtype: torch.dtype

    @property
    def index(self) -> MetadataIndex:
        """DCP's name for it."""
        return MetadataIndex(self.key, self.offset)

    @property
    def item(self) -> WriteItem:
        """DCP's instruction to write it."""
        chunk = ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size(self.shape))
        return WriteItem(self.index, WriteItemType.SHARD, tensor_data=data)


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # The default records the path on this machine.
        return StorageMeta()


class _LazyPlanner(DefaultSavePlanner):
    """Produces each tensor when the writer asks for it."""

    def __init__(self, produce: Produce) -> None:
        super().__init__()
        self.produce = produce

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _empty_object()
        return self.produce(write_item.index)


def _empty_object() -> io.BytesIO:
    """Megatron's form of a sharded object without content."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream


def write_file(
    directory: Path, prefix: str, blocks: Sequence[StoredBlock], objects: Sequence[str], produce: Produce
) -> tuple[SavePlan, list[Any]]:
    """Write one `<prefix>0.distcp` file; `produce(index)` returns the tensor of a block (stacking axes may be missing).

    Returns what `finish` needs.
    """
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    plan = SavePlan([*items, *(block.item for block in blocks)], storage_data=_StoragePrefix(prefix))
    shapes = {block.index: block.sizes for block in blocks}
    planner = _LazyPlanner(lambda index: produce(index).reshape(shapes[index]))
    results = _Writer(directory, thread_count=1).write_data(plan, planner).wait()
    return plan, results


def finish(directory: Path, written: Sequence[tuple[SavePlan, list[Any]]]) -> None:
    """Write the files that make the directory a checkpoint, once all `write_file` calls have returned."""
    _, metadata = create_default_global_save_plan([plan for plan, _ in written])
    _Writer(directory).finish(metadata, [results for _, results in written])
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(CONFIG), encoding="utf-8")


class TorchDistCheckpoint:
    """Reads tensors, or some of their rows, from a `torch_dist` checkpoint directory.

    Raises CheckpointError when it is not one, or when a file is missing or too short. Can be pickled.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        config = self.directory / "metadata.json"
        if not config.is_file():
            raise CheckpointError(f"{config} is missing: not a complete Megatron checkpoint")
        try:
            backend = json.loads(config.read_text(encoding="utf-8"))["sharded_backend"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{config} is damaged: {error!r}") from error
        if backend != "torch_dist":
            raise CheckpointError(f"{config}: format '{backend}' is not supported; save as 'torch_dist'")
        self.metadata = read_metadata(self.directory / ".metadata")
        entries = self.metadata.state_dict_metadata.items()
        self.tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
        """Shape, dtype and blocks (DCP calls them chunks) of every stored tensor by key."""
        self._check_files()

    def read(self, key: str, index: Shape = (), rows: Range | None = None) -> torch.Tensor:
        """The tensor at `index` of the leading axes, or `rows` of it, in its stored dtype."""
        entry = self.tensors[key]
        tail = tuple(entry.size[len(index) :])
        first, last = rows or (0, tail[0])
        start = (*index, first, *(0 for _ in tail[1:]))
        stop = (*(i + 1 for i in index), last, *tail[1:])
        out = torch.empty([b - a for a, b in zip(start, stop, strict=True)], dtype=entry.properties.dtype)
        items = [
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(key),
                dest_offsets=torch.Size(low - a for low, a in zip(lows, start, strict=True)),
                storage_index=MetadataIndex(key, chunk.offsets),
                storage_offsets=torch.Size(low - o for low, o in zip(lows, chunk.offsets, strict=True)),
                lengths=torch.Size(high - low for low, high in zip(lows, highs, strict=True)),
            )
            for chunk in entry.chunks
            if (overlap := _overlap(chunk, start, stop)) is not None
            for lows, highs in [overlap]
        ]
        if sum(item.lengths.numel() for item in items) != out.numel():
            raise CheckpointError(f"{self.directory}: tensor '{key}' is not stored completely")
        reader = FileSystemReader(self.directory)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        try:
            reader.read_data(LoadPlan(items), _Destination(out)).wait()
        except (OSError, RuntimeError, EOFError, ValueError, AssertionError, UnpicklingError) as error:
            file = self.metadata.storage_data[items[0].storage_index].relative_path
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.directory / file}: tensor '{key}' cannot be read: {reason}") from error
        return out.reshape(out.shape[len(index) :])

    def row_blocks(self, key: str, index: Shape, rows: Range) -> Iterator[torch.Tensor]:
        """`rows` of the tensor at `index`, block by block as they are stored, so that no block is read twice."""
        axis = len(index)
        edges = {edge for c in self.tensors[key].chunks for edge in (c.offsets[axis], c.offsets[axis] + c.sizes[axis])}
        bounds = sorted({edge for edge in edges if rows[0] < edge < rows[1]} | set(rows))
        for first, last in pairwise(bounds):
            yield self.read(key, index, (first, last))

    def _check_files(self) -> None:
        sizes: dict[str, int] = {}
        for index, info in self.metadata.storage_data.items():
            file = self.directory / info.relative_path
            if info.relative_path not in sizes:
                if Path(info.relative_path).name != info.relative_path or not file.is_file():
                    raise CheckpointError(f"{file} is missing; it holds '{index.fqn}' and others")
                sizes[info.relative_path] = file.stat().st_size
            if info.offset + info.length > sizes[info.relative_path]:
                raise CheckpointError(f"{file} is too short: '{index.fqn}' ends beyond it")


class _Destination(DefaultLoadPlanner):
    """Sends everything that is read into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self.out = out

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        out = self.out
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            out = out.narrow(axis, offset, length)
        return out

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _overlap(chunk: ChunkStorageMetadata, start: Shape, stop: Shape) -> tuple[Shape, Shape] | None:
    """Bounds of the intersection of a stored block with a range of indices; None if it is empty."""
    lows = tuple(max(a, offset) for a, offset in zip(start, chunk.offsets, strict=True))
    ends = (offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
    highs = tuple(min(b, end) for b, end in zip(stop, ends, strict=True))
    return (lows, highs) if all(low < high for low, high in zip(lows, highs, strict=True)) else None

"""Reading the `.metadata` file of a torch.distributed.checkpoint without trusting it.

DCP stores this index as a pickle, and reads it with a plain `pickle.load`, which runs any code that a foreign file
names. The index needs only a few plain classes, so nothing else is allowed here.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from real_megatron.errors import CheckpointError

_ALLOWED = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"slice", "set", "list", "dict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"'{module}.{name}' has no place in checkpoint metadata")


def read_metadata(file: Path) -> Metadata:
    """The index of a DCP checkpoint. Raises CheckpointError when it is missing, damaged or holds other objects."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: not a complete Megatron checkpoint")
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{file} is damaged or not checkpoint metadata: {error}") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{file} does not hold checkpoint metadata")
    return metadata

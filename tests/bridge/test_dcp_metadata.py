"""The index of a distributed checkpoint is read as data only."""

import os
import pickle
from pathlib import Path

import pytest
from torch.distributed.checkpoint.metadata import Metadata

from real_megatron.bridge.dcp_metadata import read_metadata
from real_megatron.errors import CheckpointError


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_foreign_code_does_not_run(tmp_path: Path) -> None:
    file, target = tmp_path / ".metadata", tmp_path / "ran"
    file.write_bytes(pickle.dumps(Metadata({}, planner_data=Hostile(target), storage_data={})))
    with pytest.raises(CheckpointError, match="mkdir' has no place in checkpoint metadata"):
        read_metadata(file)
    assert not target.exists()
    pickle.loads(file.read_bytes())
    assert target.exists(), "the file must be one that a plain pickle.load runs"


@pytest.mark.parametrize("name", ["builtins.eval", "torch.load", "torch.distributed.checkpoint.metadata.os"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    file = tmp_path / ".metadata"
    file.write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match="has no place"):
        read_metadata(file)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(Metadata({}))])
def test_damaged_metadata(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / ".metadata"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata"):
        read_metadata(file)


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        read_metadata(tmp_path / ".metadata")

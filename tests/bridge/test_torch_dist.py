"""Blocks written one by one, read back whole, by index, by rows, and by Megatron's own reader of metadata."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import load_tensors_metadata

from real_megatron.bridge.torch_dist import StoredBlock, TorchDistCheckpoint, finish, write_file
from real_megatron.errors import CheckpointError

WHOLE = torch.arange(3 * 6 * 4, dtype=torch.float32).reshape(3, 6, 4)


def write(directory: Path, drop: int | None = None) -> TorchDistCheckpoint:
    """A stack of three [6, 4] tensors in uneven blocks over two files."""
    directory.mkdir()
    blocks = []
    for i in range(3):
        for row, rows in ((0, 2), (2, 1), (3, 3)):
            for column, columns in ((0, 3), (3, 1)):
                blocks.append(StoredBlock("x", (3, 6, 4), (i, row, column), (1, rows, columns), torch.float32))
    if drop is not None:
        del blocks[drop]

    def produce(index):
        block = next(b for b in blocks if b.index == index)
        i, row, column = block.offset
        return WHOLE[i, row : row + block.sizes[1], column : column + block.sizes[2]].contiguous()

    files = [(blocks[:7], ["a._extra_state/shard_0_1"]), (blocks[7:], [])]
    finish(directory, [write_file(directory, f"__{n}_", b, objects, produce) for n, (b, objects) in enumerate(files)])
    return TorchDistCheckpoint(directory)


def test_reading(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c")
    assert torch.equal(checkpoint.read("x"), WHOLE)
    assert torch.equal(checkpoint.read("x", (2,)), WHOLE[2])
    assert torch.equal(checkpoint.read("x", (1,), (1, 5)), WHOLE[1, 1:5])
    blocks = list(checkpoint.row_blocks("x", (1,), (1, 6)))
    assert [len(block) for block in blocks] == [1, 1, 3]
    assert torch.equal(torch.cat(blocks), WHOLE[1, 1:])


def test_megatron_knows_the_format(tmp_path: Path) -> None:
    write(tmp_path / "c")
    metadata = load_tensors_metadata(str(tmp_path / "c"))
    assert metadata["x"].global_shape == (3, 6, 4)


def test_no_path_of_this_machine_is_stored(tmp_path: Path) -> None:
    write(tmp_path / "c")
    for file in (tmp_path / "c").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


def test_a_missing_block_is_noticed(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "c", drop=3)
    with pytest.raises(CheckpointError, match="'x' is not stored completely"):
        checkpoint.read("x", (0,))
    assert torch.equal(checkpoint.read("x", (1,)), WHOLE[1])

"""The streaming writer's files, read by the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_megatron.bridge.hf_writer import PlacedTensors, SafetensorsStream, plan_files, write_index
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.transforms import GateUp, Whole
from real_megatron.hf.checkpoint import INDEX

TABLE = [
    Parameter("fc1", "fc1", ("gate", "up"), GateUp(3, 5)),
    Parameter("norm", "norm", ("norm",), Whole(7)),
    Parameter("big", "big", ("big",), Whole(40, 5)),
]
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def test_files_are_filled_in_order_and_keep_a_parameter_together() -> None:
    files = [[name for name, _, _ in file.tensors()] for file in plan_files(TABLE, DTYPES, 100)]
    assert files == [["gate", "up", "norm"], ["big"]]
    assert [file.name for file in plan_files(TABLE, DTYPES, 50)] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert [file.name for file in plan_files(TABLE, DTYPES, 10**6)] == ["model.safetensors"]


def test_files_and_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    files = plan_files(TABLE, DTYPES, 100)
    written = {}
    for file in files:
        stream = SafetensorsStream(tmp_path, file)
        for name, shape, dtype in file.tensors():
            written[name] = torch.randn(shape)
            # Some rows at a time, in another dtype and not contiguous.
            for rows in (written[name][:2], written[name][2:]):
                stream.write(rows.double().t().contiguous().t() if rows.ndim == 2 else rows.double())
            written[name] = written[name].to(dtype)
        stream.close()
    write_index(tmp_path, files)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * 15 * 2 + 7 * 4 + 200 * 2
    for name, tensor in written.items():
        read = load_file(tmp_path / index["weight_map"][name])[name]
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, plan_files(TABLE, DTYPES, 10**6))
    assert not (tmp_path / INDEX).exists()


def test_wrong_and_missing_tensors(tmp_path: Path) -> None:
    stream = SafetensorsStream(tmp_path, plan_files(TABLE, DTYPES, 10**6)[0])
    with pytest.raises(ValueError, match="tensor 'gate'"):
        stream.write(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="tensor 'gate'"):
        stream.write(torch.zeros(4, 5))
    stream.write(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="tensor 'up' was not written"):
        stream.close()


def test_tensors_in_any_order_make_the_same_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    files = plan_files(TABLE, DTYPES, 100)
    tensors = {name: torch.randn(shape) for file in files for name, shape, _ in file.tensors()}
    for folder in ("streamed", "placed"):
        (tmp_path / folder).mkdir()
    for file in files:
        stream = SafetensorsStream(tmp_path / "streamed", file)
        for name, _, _ in file.tensors():
            stream.write(tensors[name])
        stream.close()
    placed = PlacedTensors(tmp_path / "placed", files)
    for name in reversed(tensors):
        with pytest.raises(ValueError, match=f"tensor '{name}' has shape"):
            placed.write(name, torch.zeros(1, 1))
        if name == "gate":
            with pytest.raises(ValueError, match="tensor 'gate' was not written"):
                placed.close()
        placed.write(name, tensors[name])
        with pytest.raises(ValueError, match=f"'{name}' is in none of the files, or was written before"):
            placed.write(name, tensors[name])
    placed.close()
    for file in files:
        assert (tmp_path / "placed" / file.name).read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()

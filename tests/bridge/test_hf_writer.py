"""The streaming writer's files, read by the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from real_megatron.bridge.hf_writer import SafetensorsStream, plan_files, write_index
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

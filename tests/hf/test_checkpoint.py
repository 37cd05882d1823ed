"""Partial, damaged and foreign checkpoints: one error that names the file and the tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from real_megatron.bridge import describe, parameters
from real_megatron.bridge.table import hf_shapes
from real_megatron.errors import CheckpointError
from real_megatron.hf.checkpoint import INDEX, HFCheckpoint
from tests.support.bridge_ranks import tiny_config, tiny_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A qwen2 checkpoint in several files."""
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def file_of(directory: Path, name: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def check(directory: Path, variant: str = "qwen2") -> HFCheckpoint:
    checkpoint = HFCheckpoint(directory)
    description = describe(tiny_config(variant))
    checkpoint.validate(hf_shapes(parameters(description)), description.tied)
    return checkpoint


def test_blocks(several: Path) -> None:
    checkpoint = check(several)
    name = "model.layers.0.mlp.gate_proj.weight"
    whole = load_file(file_of(several, name))[name]
    assert torch.equal(checkpoint.tensor(name), whole)
    assert torch.equal(checkpoint.block(name, (3, 7)), whole[3:7])
    assert torch.equal(checkpoint.block(name, (3, 7), (1, 9)), whole[3:7, 1:9])


def test_missing_file(several: Path) -> None:
    file = file_of(several, NORM)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing; .*places tensor"):
        check(several)


def test_truncated_file(several: Path) -> None:
    file = file_of(several, NORM)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        check(several)


def test_damaged_header(several: Path) -> None:
    file = file_of(several, NORM)
    data = bytearray(file.read_bytes())
    data[8:12] = b"!!!!"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        check(several)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": 5}', '{"weight_map": {"a": 5}}']
)
def test_damaged_index(several: Path, text: str) -> None:
    (several / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        check(several)


def test_index_that_points_elsewhere(several: Path) -> None:
    index = json.loads((several / INDEX).read_text())
    index["weight_map"][NORM] = "../elsewhere.safetensors"
    (several / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside"):
        check(several)


def test_tensor_missing_from_its_file(several: Path) -> None:
    file = file_of(several, NORM)
    edit(file, lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match=f"{file.name}: tensor '{NORM}' is missing"):
        check(several)


def test_tensor_that_the_index_does_not_list(several: Path) -> None:
    file = file_of(several, NORM)
    edit(file, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=f"{file.name}: tensor 'extra' is not listed"):
        check(several)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


def test_missing_tensor(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match=f"tensor '{NORM}' is missing"):
        check(single)


def test_foreign_tensor(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(CheckpointError, match="model.safetensors: tensor 'extra' is not part of this model"):
        check(single)


def test_wrong_shape(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.update({NORM: torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor '{NORM}' has shape \(63,\).*\(64,\)"):
        check(single)


def test_quantised_tensor(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=f"tensor '{NORM}' has dtype I8"):
        check(single)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        HFCheckpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="save the model as safetensors"):
        HFCheckpoint(tmp_path)


def test_old_rotary_buffers_are_ignored(single: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(single / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(4)}))
    check(single)


def test_tied_output_layer_must_equal_the_embedding(single: Path) -> None:
    def add(change: float):
        def edit_tensors(tensors: dict) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][130, 5] += change

        return edit_tensors

    edit(single / "model.safetensors", add(0.0))
    check(single)
    edit(single / "model.safetensors", add(1.0))
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        check(single)


def test_tied_embeddings_are_compared_to_the_last_row(single: Path) -> None:
    """In steps of two rows: 131 rows are no whole number of steps."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][130, 5] += 1

    edit(single / "model.safetensors", add)
    checkpoint = HFCheckpoint(single)
    with pytest.raises(CheckpointError, match="'lm_head.weight' differs"):
        checkpoint._require_equal("lm_head.weight", "model.embed_tokens.weight", rows=2)


def test_mappings_are_closed_after_much_reading(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = HFCheckpoint(several)
    names = list(checkpoint.entries)
    for name in names:
        checkpoint.tensor(name)
    assert len(checkpoint._handles) > 2
    monkeypatch.setattr("real_megatron.hf.checkpoint.REMAP_BYTES", 1)
    checkpoint.tensor(names[0])
    assert len(checkpoint._handles) == 1

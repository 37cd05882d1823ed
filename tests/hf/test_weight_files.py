"""Directories with several sets of weights: each reader takes what transformers takes, or the directory is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import CheckpointError
from real_megatron.hf.checkpoint import INDEX, SINGLE, HFCheckpoint, check_servers_read_the_same
from real_megatron.hf.model import load_model
from real_megatron.rollout.checkpoint_names import check_names
from real_megatron.rollout.sglang.engine import SGLangEngine
from tests.support.bridge_ranks import tiny_model
from tests.support.rollout_specs import engine_spec

SHARDS = "100KB"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint as a single file, and another, with other values, in several."""
    root = tmp_path_factory.mktemp("saved")
    for name, options in {"single": {}, "shards": {"max_shard_size": SHARDS}}.items():
        tiny_model("qwen2").save_pretrained(root / name, **options)
    for file in (root / "shards").glob("*.safetensors"):
        save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file, {"format": "pt"})
    return {name: root / name for name in ("single", "shards")}


def add(directory: Path, name: str) -> None:
    """A file that is no part of the checkpoint; where names of tensors can be those of the model, they are."""
    foreign = {"model.norm.weight": torch.zeros(64), "layers.0.attention.wq.weight": torch.zeros(4, 4)}
    if name == INDEX:
        entries = dict.fromkeys(load_file(directory / SINGLE), SINGLE)
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    elif name.endswith(".bin"):
        torch.save(foreign, directory / name)
    else:
        save_file(foreign, directory / name, {"format": "pt"})


BESIDE = {
    "single": ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", INDEX],
    "shards": ["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"],
}


@pytest.mark.parametrize(("kind", "beside"), [(kind, name) for kind, names in BESIDE.items() for name in names])
def test_every_reader_takes_what_transformers_takes(
    kind: str, beside: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved[kind], directory)
    add(directory, beside)
    expected = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    ours = HFCheckpoint(directory)
    assert ours.entries.keys() | {"lm_head.weight"} == expected.keys() | {"lm_head.weight"}
    loaded = load_model(directory, torch.float32).state_dict()
    for name in ours.entries:
        assert torch.equal(ours.tensor(name), expected[name]), name
        assert torch.equal(loaded[name], expected[name]), name
    check_names(directory, {name: list(shape) for name, shape in ours.shapes.items()}, tied=True)
    if kind == "single" and beside.startswith(("consolidated", "adapter")):
        with pytest.raises(CheckpointError, match=f"holds {beside} beside {SINGLE}, and no {INDEX}: .*Move {beside}"):
            check_servers_read_the_same(directory)
    else:
        check_servers_read_the_same(directory)


@pytest.fixture
def both(saved: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(saved["shards"], tmp_path / "both")
    shutil.copy(saved["single"] / SINGLE, tmp_path / "both")
    return tmp_path / "both"


def test_two_sets_are_refused_by_every_reader(both: Path, tmp_path: Path) -> None:
    message = f"holds two sets of weights: {SINGLE}, which transformers reads, and {INDEX} with model-00001-of-.*Remove"
    spec = engine_spec(RolloutConfig(servers=["http://127.0.0.1:9"]), both, tmp_path, serve_loaded=True)
    for read in (
        lambda: HFCheckpoint(both),
        lambda: load_model(both, torch.float32),
        lambda: check_servers_read_the_same(both),
        lambda: SGLangEngine(spec),
    ):
        with pytest.raises(CheckpointError, match=message):
            read()
    shards = list(both.glob("model-*.safetensors"))
    (both / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"beside {SINGLE}"):
        SGLangEngine(spec)
    for file in shards:
        file.unlink()
    HFCheckpoint(both)
    check_servers_read_the_same(both)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("adapter_config.json", "{}", "adapter_config.json: an adapter beside .*merge_and_unload"),
        ("config.json", '{"transformers_weights": "x.safetensors"}', "transformers_weights names 'x.safetensors'"),
    ],
)
def test_what_sends_transformers_elsewhere_is_refused(
    file: str, text: str, message: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(saved["single"], tmp_path / "model")
    (tmp_path / "model" / file).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        HFCheckpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_weights_of_another_kind_alone_are_named(name: str, tmp_path: Path) -> None:
    add(tmp_path, name)
    with pytest.raises(CheckpointError, match=rf"neither {SINGLE} nor {INDEX} found \(but {name}"):
        HFCheckpoint(tmp_path)

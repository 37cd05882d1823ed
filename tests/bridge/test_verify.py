"""Verification by logits, and the command-line tools around it."""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from real_megatron.bridge import convert_hf_to_megatron
from tests.support.bridge_ranks import YARN, tiny_model, verify_on_one_rank
from tests.support.ranks import run_ranks

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "hf"
    tiny_model("qwen3").save_pretrained(path)
    return path


def run_tool(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a tool to its end; SystemExit when it fails."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise


def test_equal_models_pass_and_others_fail(hf: Path, tmp_path: Path) -> None:
    convert_hf_to_megatron(hf, tmp_path / "m", workers=1, progress=False)
    for megatron in (None, str(tmp_path / "m")):
        (difference, passed) = run_ranks(1, verify_on_one_rank, str(hf), megatron)[0]
        assert passed and difference <= 1e-5
    other = tmp_path / "other"
    shutil.copytree(hf, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0, 0] += 0.1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (difference, passed) = run_ranks(1, verify_on_one_rank, str(other), str(tmp_path / "m"))[0]
    assert not passed and difference > 1e-4


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        ("qwen3", {"head_dim": 8, "rope_parameters": YARN}, r"it has no decoder\.\S*(q|k)_layernorm\.weight\)"),
        ("qwen2", {"intermediate_size": 128}, r"Global shape mismatch .* for key \S*\.linear_\S*\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_in_one_line(
    model: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Qwen2 has no norms of queries and keys, which Qwen3 has."""
    tiny_model(model, tie_word_embeddings=True, **changes).save_pretrained(tmp_path / "hf")
    tiny_model("qwen2").save_pretrained(tmp_path / "qwen2")
    convert_hf_to_megatron(tmp_path / "qwen2", tmp_path / "m", workers=1, progress=False)
    with pytest.raises(RuntimeError, match=rf"OSError: .*/m: does not hold this model's weights \({reason}"):
        run_ranks(1, verify_on_one_rank, str(tmp_path / "hf"), str(tmp_path / "m"))


def test_tools_there_and_back(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--tensor", 2, "--workers", 1]
    run_tool("convert_hf_to_megatron.py", hf, tmp_path / "m", *options, monkeypatch=monkeypatch)
    back = [tmp_path / "m", tmp_path / "h", "--workers", 1]
    run_tool("convert_megatron_to_hf.py", *back, monkeypatch=monkeypatch)
    assert "214,144 parameters" in capsys.readouterr().out
    first, second = load_file(hf / "model.safetensors"), load_file(tmp_path / "h" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    run_tool("convert_megatron_to_hf.py", tmp_path / "m", "--dry-run", monkeypatch=monkeypatch)
    assert "linear_qkv" in capsys.readouterr().out


def test_a_tools_error_is_one_line(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_tool("convert_hf_to_megatron.py", hf, tmp_path / "m", "--tensor", 3, monkeypatch=monkeypatch)
    assert stop.value.code == 1 and capfd.readouterr().err.startswith("error: tensor=3 is neither")

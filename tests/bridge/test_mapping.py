"""The dry run: the mapping from config.json alone."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from real_megatron.bridge import ParallelLayout, describe, dry_run
from real_megatron.bridge.mapping import mapping
from real_megatron.errors import ConfigError
from real_megatron.hf.side_files import read_config

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    shutil.copy(CONFIGS / "Qwen3-30B-A3B.json", tmp_path / "config.json")
    return tmp_path


def test_rows(config_only: Path) -> None:
    rows = {row.megatron: row for row in mapping(describe(read_config(config_only)), ParallelLayout(tensor=2))}
    fc1 = rows["decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"]
    assert fc1.te_name == "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}"
    assert fc1.hf == tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{n}_proj.weight" for n in ("gate", "up"))
    assert (fc1.whole, fc1.shard, fc1.count) == ((1536, 2048), (768, 2048), 48 * 128)
    assert rows["decoder.layers.{layer}.mlp.router.weight"].shard == (128, 2048)


def test_dry_run(config_only: Path) -> None:
    console = Console(width=200, record=True)
    console.print(dry_run(config_only, tensor=2, expert=4))
    text = console.export_text()
    assert "30,532,122,624 parameters, 56.9 GiB in bfloat16; TP 2, PP 1, EP 4" in text
    assert ".self_attn.q_proj.weight" in text and "5120 × 2048" in text and "2560 × 2048" in text


def test_impossible_layout(config_only: Path) -> None:
    with pytest.raises(ConfigError, match="expert=3 does not divide the 128 experts"):
        dry_run(config_only, expert=3)


def test_a_dry_run_of_a_hub_name_downloads_no_weights(config_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(name: str, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        asked.append((name, revision, [pattern for pattern in allow_patterns if "safetensors" in pattern]))
        return str(config_only)

    monkeypatch.setattr("real_megatron.hf.directory.snapshot_download", snapshot_download)
    assert "qwen3_moe: 30,532,122,624" in str(dry_run("owner/name", revision="v1").title)
    assert asked == [("owner/name", "v1", [])]

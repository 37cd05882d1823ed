"""The dry run: the mapping from config.json alone."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from real_megatron.bridge import dry_run, print_mapping
from real_megatron.bridge.mapping import mapping

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    shutil.copy(CONFIGS / "Qwen3-30B-A3B.json", tmp_path / "config.json")
    return tmp_path


def test_rows(config_only: Path) -> None:
    rows = {row.megatron: row for row in mapping(config_only, tp=2)}
    fc1 = rows["decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight"]
    assert fc1.te_name == "decoder.layers.{layer}.mlp.experts.linear_fc1.weight{expert}"
    assert fc1.hf == tuple(f"model.layers.{{layer}}.mlp.experts.{{expert}}.{n}_proj.weight" for n in ("gate", "up"))
    assert (fc1.whole, fc1.shard, fc1.count) == ((1536, 2048), (768, 2048), 48 * 128)
    assert rows["decoder.layers.{layer}.mlp.router.weight"].shard == (128, 2048)


def test_printing(config_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200, record=True)
    console.print(dry_run(config_only, tp=2, ep=4))
    text = console.export_text()
    assert "30,532,122,624 parameters, 56.9 GiB in bfloat16; TP 2, PP 1, EP 4" in text
    assert ".self_attn.q_proj.weight" in text and "5120 × 2048" in text and "2560 × 2048" in text
    capsys.readouterr()
    print_mapping(config_only)
    assert "30,532,122,624" in capsys.readouterr().out


def test_impossible_layout(config_only: Path) -> None:
    with pytest.raises(ValueError, match="ep=3 does not divide the 128 experts"):
        mapping(config_only, ep=3)

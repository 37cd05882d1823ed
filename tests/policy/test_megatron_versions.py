"""Which versions of Megatron-Core are taken, and what is said of a checkpoint that the installed one cannot read."""

import logging
from pathlib import Path

import pytest

from real_megatron.bridge import convert_megatron_to_hf
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.errors import CheckpointError, ConfigError
from real_megatron.hf.checkpoint import HFCheckpoint
from real_megatron.policy import megatron_versions, model
from real_megatron.policy.verify import load_weights
from tests.support.bridge_ranks import save_in_newest_form, tiny_model
from tests.support.ranks import run_ranks


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.18.2", "0.19.0rc1", "0.19.2"])
def test_known_versions_are_taken_without_a_word(version: str, caplog: pytest.LogCaptureFixture) -> None:
    megatron_versions.check(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.15.4", "0.16.0"])
def test_an_old_version_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"megatron-core {version} .*pip install \"megatron-core>=0.16.1,<0.20\""):
        megatron_versions.check(version)


@pytest.mark.parametrize("version", ["0.20.0", "1.0"])
def test_a_version_that_was_not_tried_gets_a_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        megatron_versions.check(version)
    assert f"megatron-core {version} is newer" in caplog.text and "--verify" in caplog.text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, and its counterpart `megatron` in the form of Megatron-Core 0.19."""
    root = tmp_path_factory.mktemp("versions")
    tiny_model("qwen3").save_pretrained(root / "hf")
    run_ranks(1, save_in_newest_form, str(root / "hf"), str(root / "megatron"))
    return root


def test_the_converter_reads_the_form_without_common_pt(models: Path, tmp_path: Path) -> None:
    assert not (models / "megatron/common.pt").exists()
    back = tmp_path / "back"
    convert_megatron_to_hf(models / "megatron", back, hf_path=models / "hf", workers=1, progress=False)
    source, found = HFCheckpoint(models / "hf"), HFCheckpoint(back)
    assert source.entries.keys() == found.entries.keys()
    assert all(source.tensor(name).equal(found.tensor(name)) for name in source.entries)


@pytest.mark.parametrize("read", [megatron_versions.read_common_state, lambda path: load_weights([], path)])
def test_an_old_version_says_that_the_checkpoint_is_newer(models: Path, read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_versions, "INSTALLED", "0.18.2")
    with pytest.raises(CheckpointError, match=r"common.pt is missing: .*0\.19 or newer has written it"):
        read(models / "megatron")


def test_hybrid_model_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_versions, "INSTALLED", "0.18.2")
    with pytest.raises(ConfigError, match=r"model.megatron_class = HybridModel needs Megatron-Core 0.19 .*0\.18\.2"):
        model._judge_class(ModelConfig(megatron_class="HybridModel"), ParallelConfig())

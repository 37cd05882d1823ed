"""Checkpoints written for a sync by disk: loadable, whole or not at all."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.rollout.engine import WeightSyncError
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.spool import CheckpointSpool
from tests.support.rollout_models import byte_level, tiny_qwen3


def model(seed: int):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_qwen3(64)).eval()


def write(spool: CheckpointSpool, label: str, source, limit: int = 4096) -> Path:
    spool.open(label)
    for bucket in bucketed(source.named_parameters(), limit):
        spool.add(bucket)
    return spool.finish(label)


@pytest.fixture
def spool(tmp_path):
    model(0).save_pretrained(tmp_path / "start")
    return CheckpointSpool(tmp_path / "spool", tmp_path / "start")


def test_transformers_loads_what_was_spooled(spool):
    source = model(1)
    path = write(spool, "run-1", source)
    assert len(list(path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(path)
    for (name, a), (_, b) in zip(source.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_side_files_go_along_and_code_does_not(tmp_path, spool):
    start = tmp_path / "start"
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(start)
    weights = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}
    for name in ("modeling_own.py", "pytorch_model.bin", "vocab.json", "merges.txt", "tokenizer.model"):
        (start / name).write_text("x")
    path = write(spool, "run-1", model(1))
    kept = {file.name for file in start.iterdir()} - weights - {"modeling_own.py"}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= kept
    copied = {file.name for file in path.iterdir() if not file.name.startswith("model")}
    assert copied == kept and (path / "merges.txt").read_text() == "x"


def test_older_checkpoints_go_only_when_told(spool):
    first = write(spool, "run-1", model(1))
    second = write(spool, "run-2", model(2))
    assert first.exists() and spool.finished == second
    spool.discard_others()
    assert not first.exists() and second.exists()


def test_a_full_disk_is_one_error_and_leaves_nothing_partial(spool):
    """A real write error: files of this process may not grow beyond 2 KiB for a moment."""
    first = write(spool, "run-1", model(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        with pytest.raises(WeightSyncError, match="no space left for .*run-2"):
            write(spool, "run-2", model(2), limit=10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in first.parent.iterdir()] == ["run-1"]
    assert spool.finished == first
    assert write(spool, "run-3", model(3)).exists()


def test_an_unwritable_directory_is_named(tmp_path):
    model(0).save_pretrained(tmp_path / "start")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightSyncError, match="cannot write .*file"):
        CheckpointSpool(tmp_path / "file", tmp_path / "start").open("run-1")

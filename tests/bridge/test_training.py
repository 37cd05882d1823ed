"""A mixture of experts trains the same at every layout, and its training checkpoint converts to Hugging Face."""

from pathlib import Path

import pytest
import torch

from real_megatron.bridge import convert_megatron_to_hf
from real_megatron.errors import CheckpointError
from real_megatron.hf.checkpoint import HFCheckpoint
from tests.support.bridge_ranks import tiny_config, train_and_save
from tests.support.policy_ranks import VOCAB, make_config, write_checkpoint
from tests.support.ranks import run_ranks

LAYOUTS = [
    dict(pipeline=2, expert=2),
    dict(tensor=2, expert=2, sequence_parallel=True),
    dict(context=2, expert=2),
    dict(tensor=2, context=2, expert=2, sequence_parallel=True),
]


def test_experts_train_alike_and_their_checkpoint_converts(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", tiny_config("qwen3_moe", vocab_size=VOCAB))
    ((alone, weights),) = run_ranks(1, train_and_save, [make_config(hf)], None)[0]
    configs = [make_config(hf, parallel=layout) for layout in LAYOUTS]
    results = run_ranks(4, train_and_save, configs, str(tmp_path / "last"))[0]
    for losses, found in results:
        # float32 sums over some 100 tokens in another order; the loss is a difference of terms of size 100.
        assert losses == pytest.approx(alone, abs=1e-4)
        for name, tensor in weights.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # A training checkpoint has no configuration of the model beside it.
    with pytest.raises(CheckpointError, match=r"name the original Hugging Face checkpoint \(hf_path, --hf\)"):
        convert_megatron_to_hf(tmp_path / "last", tmp_path / "back", workers=1, progress=False)
    # The optimizer's state is in the checkpoint too, and is ignored.
    convert_megatron_to_hf(tmp_path / "last", tmp_path / "back", hf_path=hf, workers=1, progress=False)
    back = HFCheckpoint(tmp_path / "back")
    trained = results[-1][1]
    assert back.entries.keys() == trained.keys()
    assert not torch.equal(trained["model.norm.weight"], HFCheckpoint(hf).tensor("model.norm.weight"))
    for name, tensor in trained.items():
        assert torch.equal(back.tensor(name), tensor), name

"""HybridModel in GPTModel's place: same names, same numbers, same checkpoints (docs/hybrid_model.md)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.policy.megatron_versions import require_hybrid_model

try:
    require_hybrid_model()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

from tests.support.bridge_ranks import tiny_model
from tests.support.hybrid_ranks import gradients, logits, stored_parts
from tests.support.policy_ranks import (
    TEN,
    load_and_continue,
    make_config,
    save_and_continue,
    train,
    write_checkpoint,
)
from tests.support.ranks import run_ranks

SEQUENCE = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = {
    "TP2": {"parallel": {"tensor": 2}},
    "TP2 SP, full recompute": {"parallel": SEQUENCE, "model": {"recompute": "full"}},
    "DP2, distributed optimizer": {},
    "PP2 VPP2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    "CP2, selective recompute": {"parallel": {"context": 2}, "model": {"recompute": "selective"}, "scale": TEN},
}
VARIANTS = ["qwen2", "qwen3", "qwen3_moe", "qwen3_moe_tied", "mixtral"]


@pytest.fixture(scope="module", params=VARIANTS)
def hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, vocab_size=90).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense"))


def both(checkpoint: Path, **sections: dict[str, Any]) -> tuple[RunConfig, RunConfig]:
    """The same configuration with HybridModel and with GPTModel."""
    model = sections.pop("model", {})
    hybrid = make_config(checkpoint, model={**model, "megatron_class": "HybridModel"}, **sections)
    return hybrid, make_config(checkpoint, model=model, **sections)


def test_logits_are_those_of_transformers(hf: Path) -> None:
    """float32: 1e-5 of the largest logit, as `verify` asks."""
    found, expected = run_ranks(1, logits, str(hf))[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("parallel", [{}, SEQUENCE, {"pipeline": 2}], ids=["one rank", "TP2 SP", "PP2"])
def test_names_and_checkpoint_keys_are_those_of_gpt_model(hf: Path, parallel: dict) -> None:
    """Key, shape, offset and replica of every stored tensor and object, on each rank."""
    hybrid, gpt = both(hf, parallel=parallel)
    ranks = 2 if parallel else 1
    assert run_ranks(ranks, stored_parts, hybrid) == run_ranks(ranks, stored_parts, gpt)


@pytest.mark.parametrize("head", ["linear", "logits"])
def test_loss_and_gradients_are_those_of_gpt_model(hf: Path, head: str) -> None:
    """Bit for bit: the same operations in the same order."""
    found, expected = (run_ranks(1, gradients, config)[0] for config in both(hf, model={"head": head}))
    assert found.keys() == expected.keys() and len(found) > 20
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.any() or "local_experts" in name, name  # an expert may have had no token


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_gpt_model_does(dense: Path, layout: str) -> None:
    results = [run_ranks(2, train, config)[0] for config in both(dense, **LAYOUTS[layout])]
    (curve, weights), (expected_curve, expected_weights) = results
    for metrics, expected in zip(curve, expected_curve, strict=True):
        assert metrics == pytest.approx(expected, rel=1e-6)
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["qwen3", "qwen3_moe"])
def test_a_checkpoint_of_either_model_continues_in_the_other(variant: str, dense: Path, tmp_path: Path) -> None:
    """Weights, Adam's moments and schedule, at the layout that wrote them: bit for bit. At another: relative 1e-4."""
    hf = dense
    if variant != "qwen3":
        hf = tmp_path / "hf"
        tiny_model(variant, vocab_size=90).save_pretrained(hf)
    here, there = (both(hf, parallel=parallel) for parallel in (SEQUENCE, {"pipeline": 2}))
    run_ranks(2, save_and_continue, here[0], tmp_path / "HybridModel")
    expected = run_ranks(2, save_and_continue, here[1], tmp_path / "GPTModel")[0]
    for hybrid, gpt in (here, there):
        for config, directory in ((hybrid, tmp_path / "GPTModel"), (gpt, tmp_path / "HybridModel")):
            state, continued = run_ranks(2, load_and_continue, config, directory)[0]
            assert state == {"step": 2}
            same = hybrid is here[0]
            assert continued.metrics == (expected.metrics if same else pytest.approx(expected.metrics, rel=1e-4))
            for name, tensor in expected.weights.items():
                torch.testing.assert_close(continued.weights[name], tensor, rtol=0, atol=0 if same else 1e-5)

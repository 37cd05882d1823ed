"""The exported checkpoint is the policy, as transformers loads it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.config import RunConfig
from real_megatron.data import load_template
from real_megatron.judging.settings import judge_config
from tests.support.policy_ranks import make_config, write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.training_ranks import export_after_steps


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (4, {"tensor": 2, "pipeline": 2})])
def test_transformers_loads_the_trained_weights(world: int, parallel: dict, tmp_path: Path) -> None:
    start = write_checkpoint(tmp_path / "start")
    (start / "prompt_template.txt").write_text("{prompt} of the start model")
    output = tmp_path / "hf"
    config = make_config(start, parallel=parallel)
    if world == 1:  # a template of one's own goes with the weights
        (tmp_path / "own.txt").write_text("Rate {prompt}\n")
        config.data.template = str(tmp_path / "own.txt")
    trained = run_ranks(world, export_after_steps, config, output)[0]
    model = AutoModelForCausalLM.from_pretrained(output)
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == before.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    assert any(not torch.equal(loaded[name], before[name]) for name in loaded)
    assert len(list(output.glob("*.safetensors"))) > 1  # the small shard limit was kept
    assert RunConfig.from_yaml(output / "real_megatron.yaml") == config
    template = load_template(judge_config(output).data.template)
    assert template.text == ("Rate {prompt}" if world == 1 else "{prompt}")
    assert (output / "prompt_template.txt").exists() == (world == 1)
    assert not list(tmp_path.glob(".hf*"))

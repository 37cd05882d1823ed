"""What a policy makes of its configuration, at settings that differ from their defaults. What they do to a step is
compared in test_policy.py; here are those that change nothing but memory, time or padding."""

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from transformers import Qwen3Config

from real_megatron.bridge import describe
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.errors import ConfigError
from real_megatron.policy import parallel_groups
from real_megatron.policy import policy as policy_module
from real_megatron.policy import verify as verify_module
from real_megatron.policy.model import check_divides, transformer_config
from tests.support.policy_ranks import SIZES, make_config, make_policy, write_checkpoint

QWEN3 = SIZES | {"head_dim": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), Qwen3Config(**QWEN3))


def test_a_policy_is_what_its_configuration_says(checkpoint, monkeypatch):
    settings = {"vocab_multiple": 7, "head": "logits", "head_memory_mib": 9, "fp32_logits": False, "dtype": "bfloat16"}
    config = make_config(checkpoint, model=settings, objective={"name": "raft"}, rollout={"temperature": 0.7})
    policy = make_policy(config)
    (chunk,) = policy.chunks
    assert (chunk.vocab_size, chunk.head_form, chunk.head_memory_bytes) == (91, "logits", 9 * 2**20)
    assert chunk.fp32_logits is False
    # Supervised training reads given responses, which have no sampling temperature.
    sampling = make_policy(make_config(checkpoint, rollout={"temperature": 0.7}))
    assert (policy.temperature, sampling.temperature) == (1.0, 0.7)
    for parameter in chunk.parameters():
        assert (parameter.dtype, parameter.main_grad.dtype) == (torch.bfloat16, torch.float32)

    def describe(config: Any, family: str) -> None:
        raise LookupError(family)

    monkeypatch.setattr(policy_module.bridge, "describe", describe)
    with pytest.raises(LookupError, match="my.module:family"):
        make_policy(make_config(checkpoint, model={"family": "my.module:family"}))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, (None, None, None)),
        ({"recompute": "full", "recompute_layers": 2}, ("full", "uniform", 2)),
        ({"recompute": "selective"}, ("selective", None, None)),
    ],
)
def test_megatrons_configuration_is_the_runs(model, expected):
    parallel = {"tensor": 2, "pipeline": 4, "virtual_pipeline": 3, "context": 5, "sequence_parallel": True}
    parallel["account_for_loss"] = True
    description = describe(Qwen3Config(**QWEN3 | {"num_hidden_layers": 23}))
    found = transformer_config(description, ParallelConfig(**parallel), ModelConfig(dtype="bfloat16", **model))
    assert (found.recompute_granularity, found.recompute_method, found.recompute_num_layers) == expected
    if expected[0] == "selective":
        assert found.recompute_modules == ["core_attn"]
    sizes = (found.tensor_model_parallel_size, found.pipeline_model_parallel_size, found.context_parallel_size)
    assert sizes == (2, 4, 5) and found.virtual_pipeline_model_parallel_size == 3 and found.sequence_parallel
    assert (found.account_for_embedding_in_pipeline_split, found.account_for_loss_in_pipeline_split) == (False, True)
    assert found.params_dtype == found.pipeline_dtype == torch.bfloat16 and found.bf16


def test_key_and_value_heads_may_be_fewer_than_ranks():
    description = describe(Qwen3Config(**QWEN3))
    check_divides(description, ParallelConfig(tensor=4))
    with pytest.raises(ConfigError, match="parallel.tensor = 3 does not divide the model's 4 attention heads"):
        check_divides(description, ParallelConfig(tensor=3))


def test_ranks_wait_for_each_other_as_long_as_configured(monkeypatch):
    asked = []
    monkeypatch.setattr(parallel_groups.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel_groups.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(parallel_groups, "start_process_group", asked.append)
    monkeypatch.setattr(parallel_groups, "end_model_groups", lambda: None)

    def groups(**sizes: Any) -> None:
        asked.append(sizes["distributed_timeout_minutes"])
        raise InterruptedError

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", groups)
    with pytest.raises(InterruptedError):
        parallel_groups.initialize(ParallelConfig(timeout_minutes=7))
    assert asked == [7, 7]


def test_the_longest_sequence_fits_the_rotary_embedding(tmp_path):
    """Prompt and response together: with longrope longer ones would have other frequencies."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 40}
    longrope = write_checkpoint(tmp_path, Qwen3Config(**QWEN3, rope_parameters=rope))
    make_policy(make_config(longrope))
    with pytest.raises(ConfigError, match="data.max_prompt_tokens [+] data.max_response_tokens = 41"):
        make_policy(make_config(longrope, data={"max_prompt_tokens": 21}))


def test_a_verification_describes_the_model_as_asked(checkpoint, monkeypatch):
    def describe(config: Any, family: str) -> None:
        raise LookupError(family)

    monkeypatch.setattr(verify_module.bridge, "describe", describe)
    with pytest.raises(LookupError, match="my.module:family"):
        verify_module.verify(checkpoint, family="my.module:family")


@pytest.mark.parametrize(
    ("difference", "scale", "passed"),
    [(0.9e-5, 0.5, True), (1.1e-5, 0.5, False), (1.9e-4, 20.0, True), (2.1e-4, 20.0, False)],
)
def test_logits_are_equal_up_to_float32_rounding(difference, scale, passed):
    """Of the largest logit, or of 1 where that is less."""
    assert verify_module.Verification(difference, scale, tokens=1).passed == passed

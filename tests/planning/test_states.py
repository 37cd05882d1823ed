"""Bytes by arithmetic against the same rank built on the meta device."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random
from transformers import Qwen3Config, Qwen3MoeConfig

from real_megatron import bridge
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.errors import ConfigError
from real_megatron.planning import memory
from real_megatron.planning.states import Buffer, state_bytes
from real_megatron.planning.workload import Layout
from real_megatron.policy import meta, parallel_groups
from tests.support.layouts import described

pytestmark = pytest.mark.usefixtures("no_process_group")


@pytest.fixture(scope="module")
def tiny() -> bridge.ModelDescription:
    """Two layers of four experts; odd widths, so that alignment and padding matter."""
    return bridge.describe(
        Qwen3MoeConfig(
            vocab_size=100,
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=52,
            moe_intermediate_size=28,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


@pytest.fixture(scope="module")
def tied() -> bridge.ModelDescription:
    return bridge.describe(
        Qwen3Config(
            vocab_size=100,
            hidden_size=36,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            intermediate_size=52,
            tie_word_embeddings=True,
        )
    )


def layout_of(name: str, world: int, model: ModelConfig | None = None, **sizes) -> Layout:
    sizes.setdefault("sequence_parallel", sizes.get("tensor", 1) > 1)
    return Layout(described(name), ParallelConfig(**sizes), model or ModelConfig(), world)


def check(layout: Layout, stage: int, rank: int = 0) -> None:
    """rank: among those of the stage, which follow each other."""
    place = stage * (layout.world // layout.parallel.pipeline) + rank
    built = meta.built_bytes(layout.description, layout.parallel, layout.model, layout.world, place)
    # Ranks of a stage go through TP, then CP, then DP; experts' ranks through TP, then EP.
    tensor, expert = layout.parallel.tensor, layout.parallel.expert
    ours = state_bytes(layout, stage, rank // tensor, rank // (tensor * expert))
    assert (ours.weights, ours.gradients, ours.optimizer) == (built.weights, built.gradients, built.optimizer)
    assert ours.total > 0


RECIPES = {
    "Mistral-7B-v0.2": dict(world=16, tensor=2, pipeline=2, virtual_pipeline=2),
    "Qwen3-8B": dict(world=16, tensor=4, pipeline=2, context=2, virtual_pipeline=3),
    # Three data-parallel ranks, for which the end of each bucket is padded.
    "Qwen3-32B": dict(world=96, tensor=8, pipeline=4),
    "Llama-3.1-70B": dict(world=64, tensor=8, pipeline=8),
    "Qwen2.5-72B": dict(world=64, tensor=8, pipeline=8),
    "Qwen3-30B-A3B": dict(world=512, tensor=8, pipeline=8, expert=8),
    "Qwen3-235B-A22B": dict(
        world=512, tensor=8, pipeline=8, expert=8, account_for_embedding=True, account_for_loss=True
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bytes_are_those_of_the_model_that_is_built(name):
    layout = layout_of(name, **RECIPES[name])
    for stage in {0, layout.parallel.pipeline - 1}:
        check(layout, stage)


@pytest.mark.parametrize("rank", [0, 1, 5, 14, 15])
def test_every_rank_owns_its_part_of_the_optimizer(rank, tiny):
    """With experts, whose padding and ranks are others, on 16 ranks."""
    layout = Layout(tiny, ParallelConfig(tensor=2, expert=2, sequence_parallel=True), ModelConfig(), 16)
    check(layout, 0, rank)


@pytest.mark.parametrize(("dtype", "distributed"), product(["float32", "bfloat16"], [True, False]))
def test_dtype_and_the_plain_optimizer(dtype, distributed, tiny):
    parallel = ParallelConfig(pipeline=2, distributed_optimizer=distributed)
    layout = Layout(tiny, parallel, ModelConfig(dtype=dtype), 6)
    for stage in (0, 1):
        check(layout, stage, rank=1)


def test_tied_embeddings_stand_on_both_ends(tied):
    for pipeline, virtual in ((1, None), (2, None), (2, 2)):
        parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
        for stage in {0, pipeline - 1}:
            check(Layout(tied, parallel, ModelConfig(), 4 * pipeline), stage)


def test_stages_with_the_same_parameters_are_built_once(tied, monkeypatch):
    layout = Layout(replace(tied, tied=False), ParallelConfig(pipeline=4), ModelConfig(), 8)
    built = []
    real = memory.built_bytes
    monkeypatch.setattr(memory, "built_bytes", lambda *of: built.append(of[-1]) or real(*of))
    assert memory.built_states(layout) == {stage: state_bytes(layout, stage) for stage in range(4)}
    assert built == [0, 2, 6]


def test_ranks_own_all_elements_once():
    for bucket in (None, 100):
        buffer = Buffer.arrange([7, 300, 129, 64, 1], bucket, ranks=3)
        assert sum(buffer.owned(rank) for rank in range(3)) == 501
        assert all((end - start) % 384 == 0 for _, _, start, end in buffer.buckets)


def test_the_imagined_world_ends(tiny):
    with pytest.raises(ConfigError, match="does not divide the 3 ranks"):
        meta.built_bytes(tiny, ParallelConfig(tensor=2), ModelConfig(), 3, 0)
    meta.built_bytes(tiny, ParallelConfig(), ModelConfig(), 3, 0)
    assert not dist.is_initialized()
    assert dist.all_gather_object.__module__ == "torch.distributed.distributed_c10d"


@pytest.mark.parametrize("failing", ["initialize_model_parallel", "destroy_model_parallel"])
def test_an_imagined_world_that_fails_leaves_the_process_as_it_was(failing, tiny, monkeypatch):
    """On the way in, when Megatron has formed some groups, and on the way out."""

    def state():
        return dist.is_initialized(), dist.all_gather_object, random._CUDA_RNG_STATE_TRACKER

    real = getattr(parallel_state, failing)

    def fails(**sizes):
        real(**sizes)
        if dist.is_initialized():
            raise OSError("no such luck")

    before, numbers = state(), torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(parallel_state, failing, fails)
        with pytest.raises(OSError, match="no such luck"):
            meta.built_bytes(tiny, ParallelConfig(), ModelConfig(), 3, 0)
    assert state() == before and torch.equal(torch.get_rng_state(), numbers)
    meta.built_bytes(tiny, ParallelConfig(), ModelConfig(), 3, 0)


def test_groups_of_a_world_that_has_ended_are_forgotten(tiny):
    parallel_groups.initialize(ParallelConfig())
    dist.destroy_process_group()
    assert meta.built_bytes(tiny, ParallelConfig(), ModelConfig(), 3, 0).weights

"""Estimated bytes of activations: against what torch counts on the CPU, and against what follows from sharding."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from real_megatron import bridge
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.planning.activations import ActivationBytes, activation_bytes, in_flight
from real_megatron.planning.saved_tensors import CPU, GPU, MicrobatchSize, Shard, head_bytes, layer_bytes
from real_megatron.planning.workload import Layout
from tests.support.layouts import described
from tests.support.planning_ranks import most_saved
from tests.support.policy_ranks import VOCAB, make_config, write_checkpoint
from tests.support.ranks import run_ranks

SIZES = dict(vocab_size=VOCAB, hidden_size=128, head_dim=32, num_attention_heads=4, max_position_embeddings=256)
# Enough experts for the router to matter, behind a dense layer; as many key heads as query heads.
EXPERTS = dict(
    num_hidden_layers=2,
    intermediate_size=320,
    num_key_value_heads=4,
    moe_intermediate_size=32,
    num_experts=32,
    num_experts_per_tok=4,
    mlp_only_layers=[0],
)
MODELS = {
    "Qwen3": Qwen3Config(**SIZES, num_hidden_layers=2, intermediate_size=320, num_key_value_heads=2),
    # A single key head, which two ranks gather; an MLP narrow enough for attention to outweigh it.
    "Llama": LlamaConfig(**SIZES, num_hidden_layers=4, intermediate_size=32, num_key_value_heads=1),
    "Qwen3-MoE": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "Qwen3-MoE, softmax of all experts": Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False),
}


@dataclass(frozen=True)
class Case:
    """What is trained; on one rank, one micro-batch, float32 unless stated otherwise."""

    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    dtype: str = "float32"
    keys: dict[str, Any] = field(default_factory=dict)
    """Further ones of `model`."""
    flex: bool = False
    """With flex attention, as on a GPU."""


ONE_RANK = [
    Case("Qwen3"),
    Case("Qwen3", flex=True),
    Case("Llama", dtype="bfloat16", keys={"head": "logits"}),
    Case("Qwen3-MoE", keys={"recompute": "full"}),
]
TWO_RANKS = [
    Case("Qwen3", {"tensor": 2}),
    Case("Llama", {"tensor": 2, "sequence_parallel": True}),
    Case("Qwen3-MoE", {"tensor": 2, "sequence_parallel": True}, dtype="bfloat16"),
    Case("Qwen3", {"pipeline": 2}, groups=3),
    Case("Llama", {"pipeline": 2, "virtual_pipeline": 2}, groups=4),
    Case("Llama", {"pipeline": 2}, 3, "bfloat16", {"recompute": "full", "recompute_layers": 2}),
    Case("Qwen3", {"context": 2}),
    Case("Qwen3", {"context": 2}, flex=True),
    Case("Llama", {"context": 2}, keys={"recompute": "selective"}),
    Case("Qwen3-MoE, softmax of all experts", {"expert": 2}, groups=2),
]


@pytest.mark.parametrize(("world", "cases"), [(1, ONE_RANK), (2, TWO_RANKS)])
def test_saved_tensors_are_those_that_torch_counts(tmp_path, world, cases):
    """To 1 %: what the tables leave out, norms' statistics and indices, is up to 0.7 % at these widths."""
    checkpoints = {name: write_checkpoint(tmp_path / name, config) for name, config in MODELS.items()}
    configs = [
        make_config(
            checkpoints[case.model],
            model={"dtype": case.dtype, **case.keys},
            parallel=case.parallel,
            batch={"max_tokens": 310},
            data={"max_prompt_tokens": 128, "max_response_tokens": 64},
        )
        for case in cases
    ]
    counted = run_ranks(
        world, most_saved, [(c, case.groups, case.flex) for c, case in zip(configs, cases, strict=True)]
    )
    errors = {}
    for i, (case, config) in enumerate(zip(cases, configs, strict=True)):
        layout = Layout(bridge.describe(MODELS[case.model]), config.parallel, config.model, world)
        found, expected = [], []
        for rank in range(world):
            most, size, microbatches = counted[rank][i]
            kernels = replace(CPU, flex_attention=case.flex)
            stage = rank if config.parallel.pipeline > 1 else 0
            found.append(most)
            expected.append(activation_bytes(layout, stage, size, microbatches, kernels).saved)
        if config.parallel.expert > 1:
            # The router is not even; both ranks together have all rows.
            found, expected = [sum(found)], [sum(expected)]
        errors[str(case)] = [e / f - 1 for f, e in zip(found, expected, strict=True)]
    assert not {case: one for case, one in errors.items() if max(map(abs, one)) > 0.01}


def layout_of(name: str, recompute: str = "none", **sizes: Any) -> Layout:
    world = sizes.get("tensor", 1) * sizes.get("pipeline", 1) * sizes.get("context", 1) * sizes.get("expert", 1)
    return Layout(described(name), ParallelConfig(**sizes), ModelConfig(recompute=recompute), world)


def table_of(layout: Layout, moe: bool = False, tokens: int = 8192, load: float = 1.0) -> dict[str, float]:
    return layer_bytes(Shard(layout, MicrobatchSize(tokens), load), moe, GPU)


def test_a_layer_on_a_gpu_by_hand():
    """Qwen3-8B: hidden 4096, MLP 12288, 32 query and 8 key heads of 128; bytes of a token."""
    residual = 4 * 4096  # inputs of two norms, and of the projections behind them
    attention = 5120 + 5120 + 1024 + 4096  # as the norms take them; rotated; values; output
    mlp = 3 * 12288
    per_head = (40 + 32) * 4  # norms' statistics and log-sum-exp, in float32
    expected = 2 * (residual + attention + 4 * 128 + mlp) + per_head
    assert sum(table_of(layout_of("Qwen3-8B"), tokens=1).values()) == expected


def test_a_router_on_a_gpu_by_hand():
    """Qwen3-30B-A3B: 8 of 128 experts, whose probabilities are a softmax of the chosen ones; bytes of a token."""
    layout = layout_of("Qwen3-30B-A3B")
    indices, probabilities, routed = 2 * 8 * 8, 128 * 4, 128
    assert table_of(layout, True, tokens=1)["router"] == 8 * 4 + indices + probabilities + routed
    config = {**layout.description.transformer_config, "moe_router_pre_softmax": True}
    of_all = replace(layout, description=replace(layout.description, transformer_config=config))
    assert table_of(of_all, True, tokens=1)["router"] == 128 * 4 + indices + probabilities + routed


@pytest.mark.parametrize(("name", "moe"), [("Qwen3-8B", False), ("Qwen3-30B-A3B", True)])
def test_tensor_and_sequence_parallelism_halve_all_but_rotary_angles(name, moe):
    one, two = table_of(layout_of(name), moe), table_of(layout_of(name, tensor=2, sequence_parallel=True), moe)
    # Experts take gathered tokens.
    whole = {"cosines and sines", "expert input", "expert probabilities"}
    assert {key for key in one if two[key] != one[key] / 2} == whole & one.keys()
    assert all(two[key] == one[key] for key in whole & one.keys())


def test_without_sequence_parallelism_the_residual_stream_is_not_sharded():
    one, two = table_of(layout_of("Qwen3-8B")), table_of(layout_of("Qwen3-8B", tensor=2))
    whole = {"attention norm input", "projection input", "MLP norm input", "MLP input", "cosines and sines"}
    assert {key for key in one if two[key] == one[key]} == whole
    assert {key for key in one if two[key] == one[key] / 2} == one.keys() - whole


def test_context_parallelism_halves_all_but_keys_and_values():
    two, four = (table_of(layout_of("Qwen3-8B", context=context)) for context in (2, 4))
    whole = "keys and values of all ranks"
    assert {key for key in two if four[key] != two[key] / 2} == {whole}
    assert four[whole] == two[whole] == 2 * 8192 * 8 * 128 * 2


def test_more_ranks_than_key_heads_keep_the_gathered_projection_where_attention_is_recomputed():
    # 4 key heads.
    layouts = (layout_of("Qwen3-30B-A3B", "selective", tensor=t, sequence_parallel=True) for t in (4, 8))
    four, eight = (table_of(layout, True) for layout in layouts)
    assert four["queries, keys and values"] == 8192 * (32 + 8) / 4 * 128 * 2
    assert eight["queries, keys and values"] == 8192 * (32 + 8) * 128 * 2
    assert eight["rotated keys"] == four["rotated keys"]


def test_experts_keep_what_the_router_gives_them_wherever_they_are():
    even = table_of(layout_of("Qwen3-30B-A3B"), True)
    assert table_of(layout_of("Qwen3-30B-A3B", expert=8), True) == even
    uneven = table_of(layout_of("Qwen3-30B-A3B", expert=8), True, load=1.5)
    of_experts = {key for key in even if uneven[key] == 1.5 * even[key]}
    assert of_experts == {"expert input", "expert probabilities", "expert gate and up", "expert hidden"}
    assert all(uneven[key] == even[key] for key in even.keys() - of_experts)


def test_micro_batches_in_flight():
    four = ParallelConfig(pipeline=4)
    assert [in_flight(four, stage, 8) for stage in range(4)] == [[4], [3], [2], [1]]
    assert [in_flight(four, stage, 2) for stage in range(4)] == [[2], [2], [2], [1]]
    # 4 micro-batches through each chunk in turn, and 7, 5, 3 and 1 forward passes more than that of the first chunk.
    interleaved = ParallelConfig(pipeline=4, virtual_pipeline=2)
    assert [in_flight(interleaved, stage, 8) for stage in range(4)] == [[7, 4], [5, 4], [4, 3], [4, 1]]
    assert in_flight(interleaved, 0, 4) == [4, 4]


def stages(recompute: str, **sizes: Any) -> list[ActivationBytes]:
    """Of Qwen3-32B on four pipeline stages of 16 layers, with 8 micro-batches."""
    layout = layout_of("Qwen3-32B", recompute, pipeline=4, **sizes)
    return [activation_bytes(layout, stage, MicrobatchSize(32768, 20000), 8, GPU) for stage in range(4)]


def test_layers_of_all_stages_by_the_micro_batches_that_they_have_in_flight():
    found = stages("none")
    assert [one.layers / found[3].layers for one in found] == [4, 3, 2, 1]
    assert [one.head > 0 for one in found] == [False, False, False, True]
    assert all(one.total == one.layers + one.boundary + one.head + one.transient for one in found)


def test_full_recomputation_keeps_inputs_and_one_block():
    none, full = stages("none")[0], stages("full")[0]
    stream, angles = 32768 * 5120 * 2, 32768 * 128 * 4
    assert full.layers == 4 * (16 * stream + angles)
    # The block's input is there already.
    assert full.saved == full.layers + none.layers / 64 - stream
    assert full.transient - none.transient == none.layers / 64 - stream


def test_selective_recomputation_with_flex_attention_costs_memory():
    """It saves log-sum-exp and, under context parallelism, gathered keys and values. But values that are a view keep
    the whole output of the projection."""
    none, selective = stages("none")[3], stages("selective")[3]
    whole, values = 32768 * (64 + 2 * 8) * 128 * 2, 32768 * 8 * 128 * 2
    assert selective.layers - none.layers == 16 * (whole - values - 32768 * 64 * 4)
    none, selective = stages("none", context=2)[3], stages("selective", context=2)[3]
    own, gathered = 16384 * (64 + 2 * 8 + 8) * 128 * 2, 32768 * 2 * 8 * 128 * 2
    assert selective.layers - none.layers == 16 * (own - gathered - 16384 * 64 * 4)


def test_inputs_of_stages_are_held_where_norms_save_copies_of_them():
    stream = 4096 * 4096 * 2
    for kernels, held in ((GPU, [0, 0]), (replace(GPU, transformer_engine=False), [0, 1])):
        found = [
            activation_bytes(layout_of("Qwen3-8B", pipeline=2), stage, MicrobatchSize(4096), 4, kernels)
            for stage in range(2)
        ]
        assert [one.boundary / stream for one in found] == [2 + count for count in held]


def test_gradients_of_a_backward_pass():
    """On the first of two stages: of the embedding, where a micro-batch is small; of all experts that run as one
    kernel."""
    few = activation_bytes(layout_of("Qwen3-8B", "full", pipeline=2), 0, MicrobatchSize(100), 4, GPU)
    assert few.transient == 151936 * 4096 * 2 - few.layers / 2
    layout = layout_of("Qwen3-30B-A3B", pipeline=2, expert=4)
    together, apart = (
        activation_bytes(layout, 0, MicrobatchSize(32768), 4, kernels).transient
        for kernels in (GPU, replace(GPU, transformer_engine=False))
    )
    assert together - apart == (128 // 4 - 1) * 2 * 768 * 2048 * 2


def test_linear_head_keeps_to_its_budget():
    layout = layout_of("Qwen3-8B", "full")
    size = MicrobatchSize(1000, rows=800)

    def peak(**keys: Any) -> float:
        changed = replace(layout, model=layout.model.model_copy(update=keys))
        return activation_bytes(changed, 0, size, 1, GPU).total

    assert peak(head_memory_mib=300) - peak(head_memory_mib=200) == 100 * 2**20
    chunks = 800 * (151936 * 6 + 4096 * 4)
    assert peak(head_memory_mib=10**4) - peak(head_memory_mib=1) == chunks - 2**20
    stored = replace(layout, model=ModelConfig(head="logits"))
    assert head_bytes(Shard(stored, size), GPU)["logits"] == 800 * 151936 * 2

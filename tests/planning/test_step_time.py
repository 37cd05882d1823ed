"""Projected seconds against hand computations, and in their limits."""

import math
from dataclasses import replace

import pytest

from real_megatron import bridge
from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import BatchConfig, ModelConfig, ParallelConfig
from real_megatron.hardware import GPUS
from real_megatron.planning.efficiency import DEFAULT, Efficiency
from real_megatron.planning.links import group
from real_megatron.planning.microbatches import microbatches
from real_megatron.planning.rollout_time import rollout_time
from real_megatron.planning.servers import Servers, kv_bytes_per_token, server_memory
from real_megatron.planning.shapes import shapes
from real_megatron.planning.step_time import StepTime, step_time
from real_megatron.planning.sync_time import sync_time
from real_megatron.planning.update_time import bubble, gemm_efficiency, update_time
from real_megatron.planning.workload import Layout, Workload
from real_megatron.policy import flops
from real_megatron.policy.plan import Planner
from real_megatron.scores import ScoreTree
from tests.support.layouts import described

H100 = GPUS["H100"]
MODELS = ("Qwen3-8B", "Qwen2.5-72B", "Mistral-7B-v0.2", "Qwen3-30B-A3B", "Qwen3-235B-A22B")
JUDGE = Workload(
    prompts=64,
    responses=8,
    prompt_tokens=1000,
    response_tokens=500,
    max_prompt_tokens=2048,
    max_response_tokens=1024,
    max_tokens=16384,
)
SERVERS = Servers(gpus=8, tensor=1)
# Nothing but matrix products at their peak rate and weights read at the memory's takes time.
IDEAL = replace(
    DEFAULT, gemm=1.0, gemm_rows=0, gemm_width=0, attention=1.0, launch=0, moe_launch=0, imbalance=1.0,
    nvlink=1.0, network=1.0, nvlink_latency=0, network_latency=0, decode_memory=1.0, decode_gemm=1.0, decode_step=0,
    decode_sequence=0, reduce_latency=0, expert_imbalance=1.0, memory=1e9,
)  # fmt: skip


def layout(
    name: str = "Qwen3-8B", world: int = 1, recompute: str = "none", head: str = "logits", **sizes: int
) -> Layout:
    model = ModelConfig.model_validate({"recompute": recompute, "head": head})
    return Layout(described(name), ParallelConfig.model_validate(sizes), model, world)


def updating(of: Layout, workload: Workload = JUDGE, efficiency: Efficiency = DEFAULT) -> dict[str, float]:
    return update_time(of, workload, H100, efficiency)[0]


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_groups() -> list[Group]:
    """20 groups of a prompt of 100 tokens and 4 responses of 50."""
    return [Group([5] * 100, [Trajectory([6 + k] * 50, 49) for k in range(4)], label=1.0) for _ in range(20)]


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_closed_form_are_those_of_the_parameter_table(name):
    description = described(name)
    found, table = shapes(description), bridge.parameters(description)
    assert found.total == pytest.approx(bridge.parameter_count(description), rel=1e-3)
    experts = sum(p.hf_numel for p in table if p.expert is not None)
    assert found.experts == experts
    # A token's weight products are two FLOPs a weight; routers are left out here.
    assert 2 * found.active == pytest.approx(flops.linear_flops(description), rel=5e-3)
    matrices = [p for p in table for shape in p.transform.hf_shapes if len(shape) == 2 and "router" not in p.name]
    assert found.tensors(description.num_experts) == len(matrices)


def test_a_server_holds_its_share_of_the_weights_and_copies_of_key_and_value_heads():
    description = described("Qwen3-30B-A3B")  # 4 key and value heads of 128 in 48 layers
    assert kv_bytes_per_token(description, 1) == 48 * 2 * 4 * 128 * 2
    assert kv_bytes_per_token(description, 4) == kv_bytes_per_token(description, 8) == 48 * 2 * 128 * 2
    whole = server_memory(description, 1)
    assert whole == pytest.approx(2 * bridge.parameter_count(description), rel=1e-3)
    assert server_memory(description, 4) == whole / 4
    assert server_memory(description, 8) == whole / 8 + 48 * 2 * 2048 * 4 * 128 * 2 / 8


# --- the update ---------------------------------------------------------------------------------------------------


def test_one_gpu_takes_its_flops_over_its_peak():
    seconds = updating(layout(), efficiency=IDEAL)
    tree_tokens = 64 * (1000 + 8 * 500)
    description = described("Qwen3-8B")
    prompt = 1000 * 1001 / 2
    response = 500 * 1000 + 500 * 501 / 2
    pairs = 64 * (prompt + 8 * response) * 36
    forward = flops.linear_flops(description) * tree_tokens + 4 * 32 * 128 * pairs
    forward += flops.head_flops(description) * 64 * 8 * 500
    computed = sum(seconds[part] for part in ("matrix products", "attention", "output head"))
    assert computed == pytest.approx(3 * forward / 989e12)
    assert sum(seconds.values()) == pytest.approx(computed, rel=1e-4)


def test_a_linear_head_computes_its_logits_twice():
    stored, linear = (updating(layout(head=head), efficiency=IDEAL) for head in ("logits", "linear"))
    assert linear["output head"] == pytest.approx(stored["output head"] * 4 / 3)


def test_recomputation_is_a_further_forward_pass():
    none, selective, full = (updating(layout(recompute=r), efficiency=IDEAL) for r in ("none", "selective", "full"))
    assert "recomputation" not in none
    assert selective["recomputation"] == pytest.approx(none["attention"] / 3)
    assert full["recomputation"] == pytest.approx((none["attention"] + none["matrix products"]) / 3, rel=1e-4)


def test_unshared_prompts_are_computed_for_each_response():
    shared = microbatches(layout(), JUDGE, 1)
    apart = microbatches(layout(), replace(JUDGE, share_prompt=False), 1)
    assert (shared.tokens, apart.tokens) == (64 * 5000, 64 * 8 * 1500)
    assert shared.rows == apart.rows == 64 * 8 * 500


@pytest.mark.parametrize(
    ("pipeline", "virtual_pipeline", "count", "expected"), [(1, None, 8, 0), (4, None, 8, 3 / 8), (4, 2, 8, 3 / 16)]
)
def test_the_bubble(pipeline, virtual_pipeline, count, expected):
    assert bubble(pipeline, virtual_pipeline, count) == expected


def test_the_bubble_is_of_the_slowest_stages_work():
    seconds = updating(layout(world=4, pipeline=4), efficiency=IDEAL)
    count = microbatches(layout(world=4, pipeline=4), JUDGE, 1).count
    assert count == math.ceil(64 / 3)  # a micro-batch of 16,384 tokens has three groups of 5,000
    work = seconds["matrix products"] + seconds["attention"] + seconds["output head"]
    assert seconds["pipeline bubble"] == pytest.approx(work * 3 / count, rel=1e-4)


def test_a_stage_without_the_output_layer_may_be_the_slowest():
    """Four stages of 9 of 36 layers: the last has the head besides. Of 35 layers, the output layer counted as one more,
    it has 8, and a head on few rows that takes less than a layer."""
    short = replace(JUDGE, response_tokens=10)
    assert updating(layout("Qwen3-8B", 4, pipeline=4), short, IDEAL)["output head"] > 0
    whole = described("Qwen3-8B")
    config = whole.transformer_config | {"num_layers": 35}
    description = replace(whole, transformer_config=config, sliding_window=(None,) * 35)
    parallel = ParallelConfig(pipeline=4, account_for_loss=True)
    assert "output head" not in updating(Layout(description, parallel, ModelConfig(), 4), short, IDEAL)


@pytest.mark.parametrize("sizes", [{"tensor": 8, "sequence_parallel": True}, {"context": 8}, {"pipeline": 4}, {}])
def test_more_gpus_never_compute_longer(sizes):
    previous = math.inf
    world = math.prod(v for k, v in sizes.items() if k != "sequence_parallel")
    for factor in (1, 2, 4, 8):
        seconds = updating(layout("Qwen3-8B", world * factor, **sizes))
        assert seconds["matrix products"] <= previous
        previous = seconds["matrix products"]


def test_whole_groups_round_up():
    """64 groups on 48 ranks: 16 of them run two, and the step waits for them."""
    even, odd = microbatches(layout(world=64), JUDGE, 1), microbatches(layout(world=48), JUDGE, 1)
    assert (even.tokens, odd.tokens) == (5000, 10_000)


def test_as_many_micro_batches_as_the_real_plan_has(real_groups):
    """Groups of equal lengths, at layouts that round up and that must have multiples of the pipeline size."""
    for parallel, ranks, max_tokens in (
        (ParallelConfig(), 5, 1024),
        (ParallelConfig(), 64, 1024),
        (ParallelConfig(pipeline=2, virtual_pipeline=2), 3, 1024),
        (ParallelConfig(), 2, 200),
    ):
        workload = replace(
            JUDGE, prompts=len(real_groups), responses=4, prompt_tokens=100, response_tokens=50, max_tokens=max_tokens
        )
        batch = BatchConfig(max_tokens=max_tokens)
        plan = Planner(described("Qwen3-8B"), ScoreTree.of_tokens([1, 2]), parallel, batch, 0, ranks).plan(real_groups)
        found = microbatches(
            Layout(described("Qwen3-8B"), parallel, ModelConfig(), ranks * parallel.pipeline), workload, 1
        )
        assert found.count == len(plan.microbatches)
        assert found.split == (2 if max_tokens == 200 else 1)


def test_a_group_beyond_the_budget_needs_a_scoring_pass():
    small = replace(JUDGE, max_tokens=3000)
    assert microbatches(layout(), small, 1).split == 2
    assert update_time(layout(), JUDGE, H100)[1] == {}
    update, forward = update_time(layout(), small, H100)
    assert sum(forward.values()) == pytest.approx(update["matrix products"] / 3, rel=0.6)
    assert update_time(layout(), replace(small, generates=False), H100)[1] == {}


def test_log_probs_are_a_third_of_an_update():
    _, forward = update_time(layout(), replace(JUDGE, forward_passes=2), H100, IDEAL)
    assert sum(forward.values()) == pytest.approx(2 / 3 * sum(updating(layout(), efficiency=IDEAL).values()), rel=1e-3)


def test_small_matrix_products_are_slower():
    assert gemm_efficiency(DEFAULT, 1e6, 1e6) == pytest.approx(DEFAULT.gemm, rel=1e-3)
    assert gemm_efficiency(DEFAULT, DEFAULT.gemm_rows, 1e9) == pytest.approx(DEFAULT.gemm / 2)
    one, eight = (updating(layout(world=8, tensor=t)) for t in (1, 8))
    assert eight["matrix products"] > one["matrix products"]


def test_optimizer_state_that_is_sharded_is_updated_in_shares():
    sharded, whole = (
        updating(layout(world=8, distributed_optimizer=on), replace(JUDGE, prompts=8)) for on in (True, False)
    )
    weights = shapes(described("Qwen3-8B")).total
    rate = H100.bandwidth * DEFAULT.memory
    assert whole["optimizer"] == pytest.approx(weights * 38 / rate)
    assert sharded["optimizer"] == pytest.approx(weights * (4 + 34 / 8) / rate)
    assert "gathering weights within a node" not in whole
    assert sharded["gathering weights within a node"] == pytest.approx(
        weights * 2 * 7 / 8 / (H100.nvlink * DEFAULT.nvlink), rel=1e-3
    )


# --- communication ------------------------------------------------------------------------------------------------


def test_groups_of_ranks_lie_where_megatron_puts_them():
    assert group(H100, DEFAULT, 1, 8).where == "within a node"
    assert group(H100, DEFAULT, 1, 16).where == group(H100, DEFAULT, 4, 4).where == "between nodes"
    assert group(H100, DEFAULT, 4, 2).where == "within a node"
    # Two of its ranks share a node, and bring two adapters.
    assert group(H100, DEFAULT, 4, 4).bandwidth == 2 * H100.network * DEFAULT.network
    assert group(H100, DEFAULT, 8, 4).bandwidth == H100.network * DEFAULT.network


def test_collectives_by_hand():
    ranks = group(H100, IDEAL, 1, 8)
    assert ranks.gather(8e9) == pytest.approx(7e9 / 450e9)
    assert group(H100, IDEAL, 1, 1).gather(8e9) == 0
    # 16 ranks on two nodes: half of what a rank sends leaves its node.
    assert group(H100, IDEAL, 1, 16).all_to_all(16e9) == pytest.approx(8e9 / 50e9)


def test_tensor_parallelism_by_hand():
    seconds = updating(layout(world=8, tensor=8), efficiency=IDEAL)
    tokens = 64 * 5000
    # Forward: two all-reduces a layer of the hidden state in two bytes; backward: as many.
    expected = 2 * 36 * 2 * (2 * 7 / 8) * tokens * 4096 * 2 / 450e9
    assert seconds["tensor parallelism within a node"] == pytest.approx(expected)
    sequence = updating(layout(world=8, tensor=8, sequence_parallel=True), efficiency=IDEAL)
    # Backward gathers the inputs of two products a layer once more: one half of an all-reduce each.
    assert sequence["tensor parallelism within a node"] == pytest.approx(expected * 5 / 4)


def test_experts_exchange_tokens():
    seconds = updating(layout("Qwen3-30B-A3B", 16, expert=16), efficiency=IDEAL)
    sent = 64 * 5000 / 16 * 8 * 2048 * 2  # one rank's tokens, to eight experts each; and back, and so the gradients
    assert seconds["all-to-all between nodes"] == pytest.approx(2 * 2 * 48 * sent * 8 / 16 / 50e9)
    assert "all-to-all within a node" in updating(layout("Qwen3-30B-A3B", 16, expert=8))


def test_faster_networks_make_faster_steps():
    spread = layout("Qwen3-235B-A22B", 128, tensor=4, pipeline=2, expert=16, sequence_parallel=True)
    totals = [
        sum(update_time(spread, JUDGE, replace(H100, network=H100.network * factor))[0].values())
        for factor in (0.5, 1, 2)
    ]
    assert totals[0] > totals[1] > totals[2]


# --- the rollout --------------------------------------------------------------------------------------------------


def test_decoding_one_sequence_reads_the_weights_once_a_token():
    one = replace(JUDGE, prompts=1, responses=1, response_tokens=1024)
    seconds = rollout_time(described("Qwen3-8B"), one, H100, Servers(1, 1), IDEAL)
    description = described("Qwen3-8B")
    embedding = 2 * description.vocab_size * description.hidden_size
    weights = server_memory(description, 1) - embedding
    cache = kv_bytes_per_token(description, 1) * (1000 + 512)
    assert seconds["decoding"] == pytest.approx(1024 * (weights + cache) / 3.35e12, rel=1e-3)


def test_twice_the_bandwidth_halves_a_decoding_that_it_bounds():
    few = replace(JUDGE, prompts=8)
    slow, fast = (
        rollout_time(described("Qwen3-32B"), few, replace(H100, bandwidth=rate), Servers(8, 2), IDEAL)
        for rate in (1e12, 2e12)
    )
    assert fast["decoding"] == pytest.approx(slow["decoding"] / 2, rel=0.02)


def test_the_step_waits_for_the_longest_response():
    short, long = (
        rollout_time(described("Qwen3-8B"), replace(JUDGE, max_response_tokens=m), H100, SERVERS) for m in (1024, 4096)
    )
    assert long["waiting for the longest responses"] > 2 * short["waiting for the longest responses"]
    assert sum(long.values()) > 4096 * DEFAULT.decode_step


def test_more_sequences_than_the_cache_holds_come_in_waves():
    """Twice the memory holds more sequences at a time; no memory at all for one is an infinite time."""
    many = replace(JUDGE, prompts=512, prompt_tokens=6000)
    tight, roomy = (
        rollout_time(described("Qwen3-32B"), many, replace(H100, memory=memory), Servers(8, 1))
        for memory in (82e9, 164e9)
    )
    assert sum(roomy.values()) < 0.7 * sum(tight.values())
    assert rollout_time(described("Qwen2.5-72B"), JUDGE, H100, Servers(8, 1)) == {"decoding": math.inf}


def test_few_sequences_read_few_experts():
    description = described("Qwen3-30B-A3B")
    one, many = (
        sum(rollout_time(description, replace(JUDGE, prompts=n, responses=1), H100, Servers(1, 1), IDEAL).values())
        for n in (1, 64)
    )
    assert many > 5 * one  # 8 of 128 experts, and nearly all


def test_prompts_are_prefilled_once_a_group():
    one, eight = (
        rollout_time(described("Qwen3-8B"), replace(JUDGE, responses=k), H100, SERVERS)["prefill"] for k in (1, 8)
    )
    assert one == eight == pytest.approx(8 * 1000 * 2 * 6.95e9 / (989e12 * 0.5), rel=0.03)


# --- the sync -----------------------------------------------------------------------------------------------------


def test_a_sync_by_hand():
    apart = sync_time(layout("Qwen3-32B", 16, tensor=8), H100, Servers(16, 4), IDEAL)
    size = server_memory(described("Qwen3-32B"), 1)
    assert apart["gathering shards"] == pytest.approx(size * 7 / 8 / 450e9)
    assert apart["sending to servers"] == pytest.approx(size / 50e9)  # rank 0's adapter carries all of it
    # The copy that is kept is made meanwhile: what it takes longer than sending remains.
    beyond = "copy to host memory, beyond sending"
    assert apart[beyond] == 0
    slow = sync_time(layout("Qwen3-32B", 16, tensor=8), H100, Servers(16, 4), replace(IDEAL, host_copy=20e9))
    assert slow[beyond] == pytest.approx(size / 20e9 - size / 50e9)
    assert beyond not in sync_time(layout("Qwen3-32B"), H100, Servers(8, 4, keep_weights=False))


def test_weights_come_to_rank_0_by_owner():
    """Two stages, of each the dense part and 8 expert-parallel ranks own buckets; what rank 0 has does not travel."""
    a_second = replace(IDEAL, network_latency=1.0)  # for each message between nodes
    of = layout("Qwen3-235B-A22B", 64, tensor=2, pipeline=2, expert=8)
    weights = shapes(of.description)
    size, experts = 2 * weights.total, 2 * weights.experts
    buckets = math.ceil(size / 2**29) + 2 * (1 + 8)
    sent = (7 / 8 * experts + size / 2) / 50e9 + (7 / 8 + 1 / 2) * buckets
    assert sync_time(of, H100, Servers(16, 8), a_second)["gathering shards"] == pytest.approx(
        size / 2 / 450e9 + sent, rel=1e-6
    )


def test_a_colocated_sync_crosses_no_network():
    colocated = sync_time(layout("Qwen3-32B", 8), H100, Servers(8, 4, colocated=True), IDEAL)
    assert colocated["sending to servers"] == pytest.approx(2 * server_memory(described("Qwen3-32B"), 1) / 450e9)
    assert colocated["sleeping and waking"] == DEFAULT.wake


# --- the step -----------------------------------------------------------------------------------------------------


def test_a_step_one_off_takes_the_longer_of_rollout_and_training():
    inside = step_time(layout(world=8), JUDGE, H100, SERVERS)
    ahead = step_time(layout(world=8), JUDGE, H100, replace(SERVERS, staleness=1))
    assert inside.parts == ahead.parts
    rest = inside.phase("sync") + inside.phase("host")
    assert inside.total == pytest.approx(sum(inside.parts.values()))
    assert ahead.total == pytest.approx(rest + max(inside.training, inside.phase("rollout")))
    assert sum(inside.phases.values()) == pytest.approx(inside.total)


def test_what_binds_is_the_largest_part_that_the_step_waits_for():
    parts = {"update: matrix products": 5.0, "rollout: prefill": 4.0, "rollout: decoding": 3.0, "sync: requests": 1.0}
    assert StepTime(parts).binds == "update: matrix products"
    assert StepTime(parts, overlapped=True).binds == "rollout: prefill"


def test_supervised_training_has_no_servers():
    time = step_time(layout(), replace(JUDGE, generates=False, responses=1), H100, None)
    assert set(time.phases) == {"update", "host"}
    with pytest.raises(ValueError, match="needs servers"):
        step_time(layout(), JUDGE, H100, None)

"""Properties of every plan, for all data-parallel ranks in one process, and metrics by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3MoeConfig

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.batch.types import Group, Trajectory
from real_megatron.bridge import describe
from real_megatron.config import BatchConfig, ParallelConfig
from real_megatron.errors import ConfigError
from real_megatron.policy import flops
from real_megatron.policy.model import check_divides
from real_megatron.policy.plan import Plan, Planner
from real_megatron.scores import ScoreTree

SIZES = dict(
    vocab_size=90,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)
MODEL = describe(Qwen3Config(**SIZES))
SCORES = ScoreTree.of_tokens([10, 11, 12])


def plan_all(groups: list[Group], batch: dict, ranks: int, scoring_pass: bool = False, **parallel) -> list[Plan]:
    """The plan of every data-parallel rank."""
    config = ParallelConfig(**parallel), BatchConfig(**batch)
    return [Planner(MODEL, SCORES, *config, rank, ranks).plan(groups, scoring_pass) for rank in range(ranks)]


def make_group(prompt: int, responses: list[int], name: str = "") -> Group:
    """Texts and metadata name the trajectory; the loss is on every token."""
    trajectories = [Trajectory([20 + k] * length, length - 1, text=f"{name}.{k}") for k, length in enumerate(responses)]
    return Group([1] * prompt, trajectories, label=1.0, meta={"group": name, "prompt": prompt})


@pytest.mark.parametrize("parallel", [{}, {"context": 2}, {"tensor": 4, "context": 2}])
def test_padding_alone_is_a_block_of_tokens_a_rank(parallel):
    """Attention's kernel knows that length already, and takes fewer than a block of queries for another kind."""
    packed, padding = plan_all([make_group(9, [5])], {"max_tokens": 64}, 2, **parallel)
    (microbatch,) = padding.microbatches
    context = parallel.get("context", 1)
    assert microbatch.tree == SegmentTree((Segment(128 * context),))
    assert not microbatch.row_positions.numel() and not microbatch.num_trajectories
    if microbatch.shards:
        assert [shard.index().numel() for shard in microbatch.shards] == [128] * context
    assert packed.microbatches[0].tree.total < 128, "what has tokens is packed as ever"


def random_groups(seed: int, count: int) -> list[Group]:
    rng = random.Random(seed)
    return [
        make_group(rng.randint(1, 12), [rng.randint(1, 15) for _ in range(rng.randint(1, 5))], str(i))
        for i in range(count)
    ]


def tokens_in(trajectories: list[Trajectory], prompt: int, share_prompt: bool) -> int:
    return (1 if share_prompt else len(trajectories)) * prompt + sum(len(t.response_ids) for t in trajectories)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 12),
    budget=st.integers(8, 60),
    ranks=st.integers(1, 4),
    share_prompt=st.booleans(),
    parallel=st.sampled_from([{}, {"context": 2}, {"pipeline": 2, "virtual_pipeline": 2}]),
)
def test_every_trajectory_runs_once_within_the_budget(seed, count, budget, ranks, share_prompt, parallel):
    groups = random_groups(seed, count)
    batch = {"max_tokens": budget, "share_prompt": share_prompt}
    plans = plan_all(groups, batch, ranks, **parallel)

    assert len({len(plan.microbatches) for plan in plans}) == 1
    assert len(plans[0].microbatches) % parallel.get("pipeline", 1) == 0
    assert all(plan.metrics == plans[0].metrics for plan in plans)
    microbatches = [microbatch for plan in plans for microbatch in plan.microbatches]
    assert plans[0].metrics["microbatches"] == len(microbatches)

    found = [text for microbatch in microbatches for text, _ in microbatch.responses]
    assert sorted(found) == sorted(t.text for group in groups for t in group.trajectories)

    run, by_text = 0, {t.text: t for group in groups for t in group.trajectories}
    for microbatch in microbatches:
        tokens = 0
        members = list(zip(microbatch.group.tolist(), microbatch.responses, strict=True))
        for index in {g for g, _ in members}:
            trajectories = [by_text[text] for g, (text, _) in members if g == index]
            (prompt,) = {meta["prompt"] for g, (_, meta) in members if g == index}
            tokens += tokens_in(trajectories, prompt, share_prompt)
        assert tokens <= budget or len(members) == 1
        multiple = parallel.get("context", 1)
        assert microbatch.tree.total == (-(-tokens // multiple) * multiple or 128 * multiple)
        assert (microbatch.shards is None) == (multiple == 1)
        run += tokens
    assert plans[0].metrics["tokens"] == run


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), ranks=st.integers(1, 3))
def test_subgroups_and_whole_groups_share_no_micro_batch(seed, ranks):
    """The first have advantages, the second none; and only groups beyond the budget are split."""
    groups, budget = random_groups(seed, 10), 30
    large = set()
    for group in groups:
        if tokens_in(group.trajectories, len(group.prompt_ids), share_prompt=True) > budget:
            large.add(group.meta["group"])
            for trajectory in group.trajectories:
                trajectory.advantage = 1.0
    plans = plan_all(groups, {"max_tokens": budget}, ranks)
    assert plans[0].metrics["split_groups"] == len(large)
    seen = []
    for microbatch in (m for plan in plans for m in plan.microbatches):
        names = {meta["group"] for _, meta in microbatch.responses}
        assert not names or (names <= large) == (microbatch.advantages is not None)
        seen += names - large
    assert len(seen) == len(set(seen)) == 10 - len(large)


def test_responses_stay_in_the_order_of_trajectories_when_groups_are_split():
    """Each text stands where the micro-batch has the tokens of its trajectory."""
    groups = random_groups(3, 12)
    by_text = {t.text: t for group in groups for t in group.trajectories}
    (plan,) = plan_all(groups, {"max_tokens": 25}, 1)
    assert 0 < plan.metrics["split_groups"] < 12
    for microbatch in plan.microbatches:
        for index, (text, meta) in enumerate(microbatch.responses):
            token_rows = (microbatch.token_trajectory == index).nonzero()[:, 0]
            assert microbatch.ids[token_rows].tolist() == by_text[text].response_ids
            assert text.startswith(meta["group"] + ".")


# 4 + 3 + 3 = 10 tokens; and 5 + 4 + 4 + 4 = 17, which splits into subgroups of 5 + 4 = 9.
HAND = [make_group(4, [3, 3], "a"), make_group(5, [4, 4, 4], "b")]


def cost(prompt: int, responses: list[int]) -> float:
    """Every response token and the answer are rows of the head."""
    tree = SegmentTree((Segment(prompt), *(Segment(length, 0) for length in responses)))
    return flops.training_flops(MODEL, tree, sum(responses) + len(responses))


def test_metrics_by_hand():
    (plan,) = plan_all(HAND, {"max_tokens": 10}, 1)
    assert plan.metrics == {
        "microbatches": 1 + 3,
        "imbalance": 0,
        "tokens": 10 + 3 * 9,
        "information_tokens": 10 + 17,
        "model_flops": pytest.approx(cost(4, [3, 3]) + cost(5, [4, 4, 4])),
        "shared_beginnings": 0,
        "split_groups": 1,
    }


def test_a_scoring_pass_runs_the_subgroups_once_more():
    (plan,) = plan_all(HAND, {"max_tokens": 10}, 1, scoring_pass=True)
    assert plan.metrics["tokens"] == 10 + 2 * 3 * 9
    (without_large,) = plan_all(HAND[:1], {"max_tokens": 10}, 1, scoring_pass=True)
    assert without_large.metrics["tokens"] == 10


def test_tokens_of_separate_prompts_by_hand():
    """2 · 4 + 6 = 14; and 3 · 5 + 12 = 27, which splits into 18 and 9 and runs twice."""
    (plan,) = plan_all(HAND, {"max_tokens": 20, "share_prompt": False}, 1, scoring_pass=True)
    assert plan.metrics["tokens"] == 14 + 2 * 27
    assert plan.metrics["information_tokens"] == 10 + 17
    assert plan.metrics["microbatches"] == 1 + 2


def test_branches_and_shared_beginnings_by_hand():
    """A prompt of 4, responses of 16 + 3 and 16 + 5 that begin alike, and one token more each for 1 of 10. Together 30
    tokens of 44; a budget of 26 splits them, 4 + 19 + 1 and 4 + 21 + 1."""
    responses = [Trajectory([8] * 16 + [k] * k, 15 + k) for k in (3, 5)]
    groups, tree = [Group([1] * 4, responses, label=1.0)], ScoreTree([[[5]], [[6]], [[5, 6]]])

    def metrics(max_tokens, **batch):
        settings = ParallelConfig(), BatchConfig(max_tokens=max_tokens, **batch)
        return Planner(MODEL, tree, *settings, 0, 1).plan(groups).metrics

    shared = SegmentTree((Segment(4), Segment(16, 0), Segment(3, 1), Segment(1, 2), Segment(5, 1), Segment(1, 4)))
    # Loss-carrying tokens, and two rows an answer.
    work = pytest.approx(flops.training_flops(MODEL, shared, 19 + 21 + 4))
    whole, split, apart = metrics(30), metrics(26), metrics(96, share_prompt=False)
    assert [found["tokens"] for found in (whole, split, apart)] == [30, 24 + 26, 23 + 24 + 25 + 26]
    assert [found["shared_beginnings"] for found in (whole, split, apart)] == [16 / 40, 0, 0]
    assert [found["split_groups"] for found in (whole, split, apart)] == [0, 1, 1]
    for found in (whole, split, apart):
        assert found["information_tokens"] == 30 and found["model_flops"] == work


def test_imbalance_is_weighted_by_work():
    """One whole group on two ranks: one waits for half the time. Three equal subgroups: for a quarter of it."""
    plans = plan_all(HAND, {"max_tokens": 10}, 2)
    whole, subgroups = cost(4, [3, 3]), 3 * cost(5, [4])
    expected = (0.5 * whole + 0.25 * subgroups) / (whole + subgroups)
    assert plans[0].metrics["imbalance"] == pytest.approx(expected)
    assert plans[0].metrics["microbatches"] == 2 + 4


MOE = describe(
    Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1)
)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        (MODEL, {"pipeline": 3}, "virtual_pipeline = 3 does not divide the model's 4 layers: choose one of 1, 2, 4$"),
        (MODEL, {"pipeline": 2, "virtual_pipeline": 4}, "virtual_pipeline = 8 does not divide the model's 4 layers"),
        (MODEL, {"tensor": 8}, "parallel.tensor = 8 does not divide the model's 4 attention heads"),
        (MODEL, {"expert": 2}, "parallel.expert = 2: the model has no experts"),
        (MOE, {"expert": 4}, "parallel.expert = 4 does not divide the model's 6 experts: choose one of 1, 2, 3, 6$"),
        (
            describe(Qwen3Config(**{**SIZES, "intermediate_size": 50})),
            {"tensor": 4},
            "parallel.tensor = 4 does not divide the model's 50 neurons of an MLP",
        ),
        (
            describe(Qwen3Config(**{**SIZES, "num_attention_heads": 12, "num_key_value_heads": 6})),
            {"tensor": 4},
            "parallel.tensor = 4 is neither a divisor nor a multiple of the model's 6 key and value heads",
        ),
    ],
)
def test_parallel_sizes_that_do_not_divide_the_model_are_refused(model, parallel, message):
    check_divides(model, ParallelConfig())
    with pytest.raises(ConfigError, match=message):
        check_divides(model, ParallelConfig(**parallel))


def test_embedding_and_output_layer_may_count_as_layers():
    model = describe(Qwen3Config(**{**SIZES, "num_hidden_layers": 94}))
    both = dict(account_for_embedding=True, account_for_loss=True)
    with pytest.raises(ConfigError, match="does not divide the model's 94 layers: choose one of 1, 2, 47, 94$"):
        check_divides(model, ParallelConfig(pipeline=8))
    check_divides(model, ParallelConfig(pipeline=8, **both))
    with pytest.raises(ConfigError, match="the model's 96 layers .with those that parallel.account_for_embedding"):
        check_divides(model, ParallelConfig(pipeline=5, **both))
    with pytest.raises(ValueError, match="set pipeline above 1 or switch them off"):
        ParallelConfig(account_for_loss=True)


@pytest.mark.parametrize("heads", [(4, 2), (12, 6), (12, 3), (6, 1)])
@pytest.mark.parametrize("experts", [0, 6])
def test_the_sizes_that_are_offered_are_those_that_work(heads, experts):
    sizes = {**SIZES, "intermediate_size": 48, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    moe = dict(moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, decoder_sparse_step=2)
    model = describe(Qwen3MoeConfig(**sizes, **moe) if experts else Qwen3Config(**sizes))

    def works(size):
        try:
            check_divides(model, ParallelConfig(tensor=size))
        except ConfigError as error:
            assert str(error).endswith(f"choose one of {', '.join(map(str, model.tensor_sizes))}")
            return False
        return True

    assert [size for size in range(1, 50) if works(size)] == model.tensor_sizes

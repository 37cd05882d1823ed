"""The policy's step against Hugging Face autograd and torch's Adam, and against itself at other layouts."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from real_megatron.config import OptimizerConfig
from real_megatron.errors import ConfigError
from real_megatron.objective import Totals, build_objective, summarize
from real_megatron.policy import policy as policy_module
from real_megatron.policy.forward import run_microbatches
from real_megatron.policy.optimizer import build_scheduler
from tests.support.bridge_ranks import tiny_config
from tests.support.policy_ranks import (
    HALVES,
    TEN,
    VOCAB,
    groups_of,
    head_error,
    load_and_continue,
    logprobs,
    make_config,
    make_groups,
    make_policy,
    moments_before_and_after_a_step,
    save_and_continue,
    save_as_with_a_gpu,
    scale_of,
    train,
    train_all,
    train_all_with_overlap,
    train_with_fusions,
    train_with_moments_allocated,
    write_checkpoint,
)
from tests.support.policy_reference import hf_scored
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def one_rank(checkpoint):
    return run_ranks(1, train, make_config(checkpoint))[0]


OPTIMIZER = {"clip_grad": 0.3, "weight_decay": 1.0, "beta1": 0.8, "beta2": 0.99, "eps": 1e-4, "min_lr": 1e-4}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"name": "grpo", "kl": 0.1}, "rollout": {"temperature": 0.8}},
        {"objective": {"name": "jepo"}, "rollout": {"temperature": 1.4}},
        {"optimizer": OPTIMIZER},
        {"scale": TEN},
        {"scale": HALVES, "objective": {"name": "rloo"}},
    ],
)
def test_a_step_equals_hugging_face_autograd_and_torch_adam(checkpoint, sections):
    """fp32 in both; sums over ~50 tokens in another order leave 1e-5 of the loss and 1e-4 of the clipped gradient,
    which Adam's first steps (normalised gradients) carry into the weights as 1e-4 of a learning rate of 1e-3."""
    config = make_config(checkpoint, **sections)
    optimizer = config.optimizer
    objective = build_objective(config.objective)
    ((curve, weights),) = run_ranks(1, train, config)

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optimizer.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    # Two updates of linear warm-up, then linear decay from the second to the end of the run, ten updates in all.
    down = torch.optim.lr_scheduler.LinearLR(adam, 1.0, optimizer.min_lr / 1e-3, total_iters=9)
    up = torch.optim.lr_scheduler.LinearLR(adam, 1 / 2, total_iters=1)
    schedule = torch.optim.lr_scheduler.SequentialLR(adam, [up, down], milestones=[1])
    for step, metrics in enumerate(curve):
        groups = groups_of(config, step, objective.needs_sampled_scores)
        scored = hf_scored(model, groups, config.rollout.temperature, *scale_of(config))
        totals = Totals(len(groups), scored.size, scored.token_logprobs.numel())
        loss, reference = objective(scored, totals)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip_grad)
        assert norm > optimizer.clip_grad
        assert metrics["loss"] == pytest.approx(
            loss.item(), abs=1e-5 * max(abs(metrics["loss_term1"]), abs(loss.item()))
        )
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        # The score distribution is read at the answer position, whether or not a sampled score follows.
        assert metrics["squared_error"] == pytest.approx(summarize(reference)["squared_error"], rel=1e-4)
        assert metrics["lr"] == pytest.approx(adam.param_groups[0]["lr"], rel=1e-12)
        adam.step()
        schedule.step()
    for name, reference in model.state_dict().items():
        if name in weights:
            torch.testing.assert_close(weights[name], reference, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def same_curve(found, expected, rel=1e-5):
    """Equal training: the loss is a difference of two large terms, so its error is measured in theirs."""
    for a, b in zip(found[0], expected[0], strict=True):
        size = abs(b["loss_term1"]) + abs(b.get("loss_term2", 0.0))
        assert a["loss"] == pytest.approx(b["loss"], abs=rel * size)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rel)
        assert a["reward"] == pytest.approx(b["reward"], rel=rel)
        assert a["lr"] == b["lr"]
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


VARIANTS = {
    "separate prompts": {"batch": {"share_prompt": False}},
    "stored logits": {"model": {"head": "logits"}},
    "linear head in small chunks": {"model": {"head": "linear", "head_memory_mib": 1}},
    "full recompute": {"model": {"recompute": "full"}},
    "selective recompute": {"model": {"recompute": "selective"}},
    "plain optimizer": {"parallel": {"distributed_optimizer": False}},
    "more micro-batches": {"batch": {"max_tokens": 40}},
}


def test_variants_that_must_not_change_the_result(checkpoint, one_rank):
    (found,) = run_ranks(1, train_all, [make_config(checkpoint, **sections) for sections in VARIANTS.values()])
    for result in found:
        same_curve(result, one_rank)


def test_fusions_do_not_change_the_result(checkpoint, one_rank):
    """Those that are on with a GPU: Megatron compiles them, here for the CPU."""
    same_curve(run_ranks(1, train_with_fusions, make_config(checkpoint))[0], one_rank)


def test_splitting_a_group_gives_the_same_step(checkpoint, one_rank):
    """A budget that no group fits: every group is scored first and then split."""
    for ranks, parallel in ((1, {}), (2, {"context": 2})):
        config = make_config(checkpoint, parallel=parallel)
        config.batch.__dict__["max_tokens"] = 16
        curve, weights = run_ranks(ranks, train, config)[0]
        assert all(metrics["split_groups"] > 0 for metrics in curve)
        same_curve((curve, weights), one_rank)


LAYOUTS = {
    "TP2 PP2": {"tensor": 2, "pipeline": 2},
    "TP2 SP DP2": {"tensor": 2, "sequence_parallel": True},
    "TP4 SP": {"tensor": 4, "sequence_parallel": True},
    "PP2 DP2": {"pipeline": 2},
    "PP2 VPP2 DP2": {"pipeline": 2, "virtual_pipeline": 2},
    # Four layers over six chunks: the first has the embedding alone, the last the output layer alone.
    "PP2 VPP3 DP2": {
        "pipeline": 2,
        "virtual_pipeline": 3,
        "account_for_embedding": True,
        "account_for_loss": True,
    },
    "PP4": {"pipeline": 4},
    "TP2 PP2 SP": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    "CP2 DP2": {"context": 2},
    "CP4, plain optimizer": {"context": 4, "distributed_optimizer": False},
    "TP2 SP CP2": {"tensor": 2, "sequence_parallel": True, "context": 2},
    "PP2 CP2": {"pipeline": 2, "context": 2},
    "PP2 VPP2 CP2": {"pipeline": 2, "virtual_pipeline": 2, "context": 2},
    "DP4": {},
    "DP4, plain optimizer": {"distributed_optimizer": False},
}


def test_every_layout_of_four_ranks_trains_the_same(checkpoint, one_rank):
    """Loss relative 1e-5: only the order of fp32 sums differs."""
    configs = [make_config(checkpoint, parallel=layout) for layout in LAYOUTS.values()]
    configs.append(make_config(checkpoint, parallel=LAYOUTS["TP2 PP2 SP"], model={"recompute": "full"}))
    configs.append(make_config(checkpoint, parallel=LAYOUTS["TP2 SP DP2"], model={"head": "logits"}))
    configs.append(make_config(checkpoint, parallel=LAYOUTS["PP2 CP2"], batch={"share_prompt": False}))
    for result in run_ranks(4, train_all, configs)[0]:
        same_curve(result, one_rank)


def test_sampled_scores_and_scores_of_several_tokens_train_the_same_at_every_layout(checkpoint):
    """With whole groups and with ones split over micro-batches; transformers is compared with above. Of several tokens:
    prompt, shared beginning, response and branches against a sequence for every response and branch."""
    layouts = ("DP4", "TP2 SP CP2", "PP2 DP2")
    sampled = [make_config(checkpoint, parallel=LAYOUTS[name], objective={"name": "rloo"}) for name in layouts]
    sampled[-1].batch.__dict__["max_tokens"] = 16
    branched = [make_config(checkpoint, scale=TEN, batch={"share_prompt": False, "max_tokens": 256})]
    for name in ("TP2 SP CP2", "PP2 CP2"):
        recompute = {"recompute": "full" if name == "PP2 CP2" else "none"}
        branched.append(make_config(checkpoint, parallel=LAYOUTS[name], scale=TEN, model=recompute))
    branched[-1].batch.__dict__["max_tokens"] = 40
    results = run_ranks(4, train_all, [*sampled, *branched], 2)[0]
    for expected, *found in (results[:3], results[3:]):
        assert all(metrics["split_groups"] == 0 for metrics in expected[0])
        assert all(metrics["split_groups"] > 0 for metrics in found[-1][0])
        for result in found:
            same_curve(result, expected)
    assert all(metrics["advantage_abs"] > 0 and "loss_term2" not in metrics for metrics in results[0][0])
    for apart, shared in zip(results[3][0], results[4][0], strict=True):
        assert apart["shared_beginnings"] == 0 and shared["shared_beginnings"] > 0.2
        assert apart["information_tokens"] == shared["information_tokens"] == shared["tokens"] < apart["tokens"]


def test_gradients_reduced_during_backward_are_the_same(checkpoint, one_rank):
    """As on a GPU. Megatron reduces a bucket once each of its weights has a gradient, and fails if one never has."""
    layouts = ["TP2 SP DP2", "PP2 DP2", "PP2 VPP2 DP2", "CP2 DP2", "DP4", "DP4, plain optimizer"]
    configs = [make_config(checkpoint, parallel=LAYOUTS[layout]) for layout in layouts]
    configs.append(make_config(checkpoint, parallel=LAYOUTS["PP2 DP2"], model={"head": "logits"}))
    # More micro-batches than one, of which a rank with less work gets empty ones.
    configs.append(make_config(checkpoint, batch={"max_tokens": 40}, model={"recompute": "full"}))
    for result in run_ranks(4, train_all_with_overlap, configs)[0]:
        same_curve(result, one_rank)


def test_the_head_tells_megatron_of_its_gradient(tmp_path):
    """The linear head adds its weight's gradient to Megatron's buffer itself. Where nothing else uses that weight, its
    reduction during backward starts only because the head returns a dummy as well."""
    untied = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    assert not untied.tie_word_embeddings
    config = make_config(write_checkpoint(tmp_path, untied), model={"head": "linear"})
    (expected,), (found,) = (run_ranks(2, call, [config])[0] for call in (train_all, train_all_with_overlap))
    same_curve(found, expected)


def test_experts_without_tokens_have_a_gradient(tmp_path):
    """Zeros, and not none: Megatron would wait for it when it reduces gradients during backward. Experts see a token of
    a branch or of a shared beginning once, and give it what they give it in sequences of its own."""
    hf = write_checkpoint(tmp_path, tiny_config("qwen3_moe", vocab_size=VOCAB, num_experts=16))
    config = make_config(hf, parallel={"expert": 2})
    branched, apart = (
        make_config(hf, parallel={"expert": 2}, scale=TEN, batch={"share_prompt": share, "max_tokens": 256})
        for share in (True, False)
    )
    expected, whole = run_ranks(2, train_all, [config, apart])[0]
    found, tree = run_ranks(2, train_all_with_overlap, [config, branched])[0]
    same_curve(found, expected)
    same_curve(tree, whole)


@pytest.mark.parametrize(
    ("parallel", "temperature", "head", "scale"),
    [({"pipeline": 2}, 0.6, "logits", {}), ({"pipeline": 2, "context": 2}, 1.4, "linear", TEN)],
    ids=["PP2 DP2", "PP2 CP2"],
)
def test_log_probs_reach_every_rank_and_equal_transformers(checkpoint, parallel, temperature, head, scale):
    """Those of sampled tokens at the sampling temperature, those of scores at 1."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    sections = {"batch": {"max_tokens": 48}, "rollout": {"temperature": temperature}, "model": {"head": head}}
    config = make_config(checkpoint, parallel=parallel, scale=scale, **sections)
    with torch.no_grad():
        scored = hf_scored(model, groups_of(config, 0, sampled=False), temperature, *scale_of(config))
    everywhere = run_ranks(4, logprobs, config)
    assert all(found == everywhere[0] for found in everywhere)
    flat = [t for group in everywhere[0] for t in group]
    torch.testing.assert_close(
        torch.tensor([x for tokens, _ in flat for x in tokens]), scored.token_logprobs, rtol=0, atol=1e-5
    )
    for (_, scores), expected, answered in zip(flat, scored.score_logprobs, scored.has_answer, strict=True):
        assert (scores is not None) == bool(answered)
        if answered:
            torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-5)


def test_moments_allocated_early_are_those_of_the_first_step(checkpoint, one_rank):
    curve, weights = run_ranks(1, train_with_moments_allocated, make_config(checkpoint))[0]
    assert curve == one_rank[0]
    assert all(torch.equal(tensor, one_rank[1][name]) for name, tensor in weights.items())


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_every_adams_moments_are_there_before_a_server_takes_the_memory(fused, checkpoint):
    """Sharded or not, and of an Adam as Transformer Engine has it: the first step allocates none."""
    configs = [make_config(checkpoint, parallel={"distributed_optimizer": sharded}) for sharded in (True, False)]
    for early, after in run_ranks(1, moments_before_and_after_a_step, configs, fused)[0]:
        assert early == after and len(early) > 10


def test_a_checkpoint_continues_bit_identically_and_at_other_layouts(checkpoint, tmp_path):
    """At other layouts: metrics relative 1e-4, weights 1e-5 of a step of 1e-3 (the order of fp32 sums)."""
    written = make_config(checkpoint, parallel={"tensor": 2})
    expected = run_ranks(4, save_and_continue, written, tmp_path)[0]
    state, same = run_ranks(4, load_and_continue, written, tmp_path)[0]
    assert state == {"step": 2}
    assert same.metrics == expected.metrics
    assert same.random_states == expected.random_states
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in same.weights.items())
    others = [
        (4, {"pipeline": 2}),
        (4, {"tensor": 4, "sequence_parallel": True}),
        (4, LAYOUTS["PP2 VPP3 DP2"]),
        (4, {"tensor": 2, "context": 2}),
        (1, {}),
    ]
    for ranks, parallel in others:
        _, found = run_ranks(ranks, load_and_continue, make_config(checkpoint, parallel=parallel), tmp_path)[0]
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-4), parallel
        for name, tensor in expected.weights.items():
            torch.testing.assert_close(
                found.weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name, p=parallel: f"{p}, {n}: {m}"
            )


# Of two layers: each chunk has one, the embedding alone, or the output layer alone.
ENDS_ALONE = {"pipeline": 2, "virtual_pipeline": 2, "account_for_embedding": True, "account_for_loss": True}


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("float32", [{}, {"expert": 2}, ENDS_ALONE, {}]),
        ("float32", [{"pipeline": 2, "distributed_optimizer": False}, {"expert": 2, "distributed_optimizer": False}]),
        ("bfloat16", [{"pipeline": 2, "distributed_optimizer": False}, {"distributed_optimizer": False}]),
    ],
    ids=["distributed optimizer", "plain optimizer", "plain optimizer, 16-bit weights"],
)
def test_a_checkpoint_of_experts_continues_with_other_expert_parallelism(dtype, layouts, tmp_path):
    """Each layout reads what the one before it has written. The first layer is dense: with PP2 a stage has no experts.

    Metrics relative 1e-4, weights 1e-5 of steps of 1e-3 (the order of fp32 sums), as for dense models.
    """
    small = tiny_config("qwen3_moe", vocab_size=VOCAB, num_hidden_layers=2, num_experts=4, mlp_only_layers=[0])
    hf, expected = write_checkpoint(tmp_path / "hf", small), None
    for index, parallel in enumerate(layouts):
        config = make_config(hf, parallel=parallel, model={"dtype": dtype})
        ranks = 2 if {"expert", "pipeline"} & parallel.keys() else 1
        if expected:
            state, found = run_ranks(ranks, load_and_continue, config, tmp_path / str(index - 1))[0]
            assert state == {"step": 2}
            assert found.metrics == pytest.approx(expected.metrics, rel=1e-4), parallel
            for name, tensor in expected.weights.items():
                torch.testing.assert_close(
                    found.weights[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name, p=parallel: f"{p}, {n}: {m}"
                )
        if index + 1 < len(layouts):
            expected = run_ranks(ranks, save_and_continue, config, tmp_path / str(index))[0]


def test_a_checkpoint_of_a_gpu_continues_on_a_cpu(checkpoint, tmp_path):
    """And the other way round: a generator's state has no meaning on another kind of device."""
    config = make_config(checkpoint)
    run_ranks(1, save_as_with_a_gpu, config, tmp_path)
    state, _ = run_ranks(1, load_and_continue, config, tmp_path)[0]
    assert state == {"step": 1}


class Plain:
    """An objective that needs nothing, for tests of the step around it."""

    needs_advantages = needs_old_logprobs = needs_ref_logprobs = needs_responses = False


class NotANumber(Plain):
    def __call__(self, scored, totals):
        return scored.token_logprobs.sum() * float("nan"), {"loss": torch.tensor([float("nan"), 1.0])}


class InfiniteSlope(Plain):
    """Loss 0, gradient 0 · ∞."""

    def __call__(self, scored, totals):
        loss = (0.0 * scored.token_logprobs).abs().sqrt().sum()
        return loss, {"loss": torch.tensor([float(loss), 1.0])}


@pytest.mark.parametrize(("objective", "loss"), [(NotANumber(), "nan"), (InfiniteSlope(), "0.0")])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_weights_change(checkpoint, objective, loss):
    policy = make_policy(make_config(checkpoint, optimizer={"max_skipped": 0}))
    before = {name: tensor.clone() for name, tensor in policy.export()}
    with pytest.raises(FloatingPointError, match=f"loss {loss}, gradient norm nan.*optimizer.lr"):
        policy.train_step(make_groups(), objective)
    for name, tensor in policy.export():
        assert torch.equal(tensor, before[name]), name


def test_tokens_are_those_that_run_through_the_model(checkpoint, monkeypatch):
    """Splitting repeats prompts, in the scoring pass as well."""
    config = make_config(checkpoint, batch={"max_tokens": 24})
    policy, ran = make_policy(config), []

    def run(chunks, microbatches, *args, **kwargs):
        ran.extend(microbatch.tree.total for microbatch in microbatches)
        return run_microbatches(chunks, microbatches, *args, **kwargs)

    monkeypatch.setattr(policy_module, "run_microbatches", run)
    metrics = policy.train_step(make_groups(), build_objective(config.objective))
    assert 0 < metrics["split_groups"] < 5
    assert metrics["tokens"] == sum(ran)
    assert metrics["microbatches"] < len(ran)


class Reading(Plain):
    """Records what the scoring pass and the update give it to read."""

    needs_advantages = needs_responses = True

    def __init__(self):
        self.scoring, self.update = [], []

    def rewards(self, scored):
        self.scoring += scored.responses
        return torch.zeros(scored.size)

    def advantages(self, scored):
        return self.rewards(scored)

    def __call__(self, scored, totals):
        assert len(scored.responses) == scored.size
        self.update += scored.responses
        return scored.token_logprobs.sum() + scored.score_logprobs.sum(), {"loss": torch.tensor([0.0, 1.0])}


def test_objectives_read_texts_and_metadata_in_both_passes(checkpoint):
    policy, groups, objective = make_policy(make_config(checkpoint, batch={"max_tokens": 24})), make_groups(), Reading()
    for i, group in enumerate(groups):
        group.meta = {"row": i}
        for k, trajectory in enumerate(group.trajectories):
            trajectory.text = f"{i}.{k}"
    metrics = policy.train_step(groups, objective)
    expected = [(f"{i}.{k}", {"row": i}) for i in range(5) for k in range(3)]
    scored = [(view.text, view.meta) for view in objective.scoring]
    assert scored == [row for row in expected if row in scored] and len(scored) == 3 * metrics["split_groups"] > 0
    assert sorted((view.text, view.meta) for view in objective.update) == expected


def test_fp32_logits_reach_the_head(checkpoint):
    """bfloat16, with sampled tokens at another temperature. Rounding is up to 2⁻⁹ of a logit, here 3 at the most."""
    model, rollout = {"dtype": "bfloat16", "head": "linear"}, {"temperature": 0.7}
    rounded, exact, default = (
        run_ranks(1, head_error, make_config(checkpoint, model={**model, **setting}, rollout=rollout))[0]
        for setting in ({"fp32_logits": False}, {"fp32_logits": True}, {})
    )
    # 32 exact products summed in float32
    assert max(exact) < 2e-6 and default == exact
    assert min(rounded) > 1e-3


def test_sizes_that_do_not_divide_the_world_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="does not divide the 1 ranks"):
        make_policy(make_config(checkpoint, parallel={"tensor": 2}))
    with pytest.raises(ConfigError, match="parallel.context = 2 does not divide the 1 ranks"):
        make_policy(make_config(checkpoint, parallel={"context": 2}))
    with pytest.raises(ConfigError, match="parallel.expert = 2 does not divide the 1 ranks"):
        make_policy(make_config(checkpoint, parallel={"expert": 2}))


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_schedule_is_torchs_also_after_a_resume(style, warmup):
    """Every update of a run of 12, and again from a state saved after 0, 2 and 7 of them. Float64 in both."""
    lr, min_lr, total = 1e-3, 1e-4, 12
    config = OptimizerConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup, schedule=style)

    def sgd():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)

    reference = sgd()
    rising, schedulers = max(warmup - 1, 0), torch.optim.lr_scheduler
    falling = {
        "constant": lambda: schedulers.ConstantLR(reference, 1.0),
        "linear": lambda: schedulers.LinearLR(reference, 1.0, min_lr / lr, total_iters=total - rising),
        "cosine": lambda: schedulers.CosineAnnealingLR(reference, total - rising, eta_min=min_lr),
    }[style]()
    torchs = falling
    if rising:
        up = schedulers.LinearLR(reference, 1 / warmup, total_iters=rising)
        torchs = schedulers.SequentialLR(reference, [up, falling], milestones=[rising])
    expected = []
    for _ in range(total):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        torchs.step()
    assert expected[0] == pytest.approx(lr / max(warmup, 1), rel=1e-12)

    def rates(scheduler, optimizer, count):
        found = []
        for _ in range(count):
            found.append(optimizer.param_groups[0]["lr"])
            scheduler.step(increment=1)
        return found

    for done in (0, 2, 7):
        first, second = sgd(), sgd()
        before, after = (build_scheduler(o, config, total) for o in (first, second))
        found = rates(before, first, done)
        after.load_state_dict(before.state_dict())
        assert found + rates(after, second, total - done) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("warmup", [10, 11])
def test_a_warm_up_that_does_not_end_is_refused(warmup):
    with pytest.raises(ConfigError, match=f"optimizer.warmup_steps = {warmup} must be less than the run's 10"):
        build_scheduler(None, OptimizerConfig(warmup_steps=warmup), 10)


def test_groups_are_not_changed_by_a_step(checkpoint):
    policy = make_policy(make_config(checkpoint))
    groups, copy = make_groups(), make_groups()
    policy.train_step(groups, build_objective(policy.config.objective))
    assert [dataclasses.asdict(g) for g in groups] == [dataclasses.asdict(g) for g in copy]

"""Policies for tests: a tiny checkpoint, fixed groups, and functions that run on spawned ranks."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core.optimizer
import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import RunConfig, ScaleConfig
from real_megatron.head import reference_gathered_log_softmax
from real_megatron.objective import build_objective
from real_megatron.policy import checkpoint, cpu, model, optimizer
from real_megatron.policy.attention import HeadRows
from real_megatron.policy.judge_head import JudgeHead
from real_megatron.policy.optimizer import chained
from real_megatron.policy.policy import Policy
from real_megatron.scores import ScoreTree
from tests.support.ranks import forget_policies

VOCAB = 90
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
"""Of a model of two narrow layers, of any family."""
SCORE_IDS = [10, 11, 12]
SCORE_VALUES = [1.0, 2.0, 3.0]
TEN = {"scores": [str(k) for k in range(1, 11)]}
"""A scale whose `10` is two tokens: `1` ends where no `0` follows."""
HALVES = {"scores": [f"{k / 2:g}" for k in range(2, 11)], "ends": ["eos"]}
"""1, 1.5, … 5: three tokens or one, which the end of sequence must follow."""
EOS = 3


def write_checkpoint(directory: Path, hf_config: PretrainedConfig | None = None) -> Path:
    """A random checkpoint, Qwen3 unless told otherwise, with weights large enough for logits that differ."""
    hf_config = hf_config or Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(directory)
    return directory


def make_groups(count: int = 5, responses: int = 3, seed: int = 0, sampled: bool = False) -> list[Group]:
    """Groups of uneven lengths; one response per group has no answer. With `sampled` a token follows each answer
    position: in every group the label's score, behind a forced anchor, and in others another score or no score."""
    rng = random.Random(seed)

    def draw(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(rng.randint(low, high))]

    groups = []
    for _ in range(count):
        trajectories = []
        for k in range(responses):
            ids = draw(2, 8)
            trajectories.append(
                Trajectory(
                    ids,
                    None if k == 1 else len(ids) - 1,
                    old_logprobs=[-2.0] * len(ids),
                    ref_logprobs=[-2.5] * len(ids),
                )
            )
        groups.append(Group(draw(3, 12), trajectories, label=float(rng.randint(1, 3))))
    return [_with_scores(group, rng) for group in groups] if sampled else groups


def _with_scores(group: Group, rng: random.Random) -> Group:
    def scored(k: int, t: Trajectory) -> Trajectory:
        if t.answer_index is None:
            return t
        token = SCORE_IDS[int(group.label) - 1] if k == 0 else rng.choice([*SCORE_IDS, 3])
        mask = [i < len(t.response_ids) - 1 for i in range(len(t.response_ids))] if k == 0 else t.loss_mask
        return replace(
            t,
            response_ids=[*t.response_ids, token],
            loss_mask=[*mask, True],
            old_logprobs=[*t.old_logprobs, -2.2],
            ref_logprobs=[*t.ref_logprobs, -2.7],
            forced_anchor=k == 0,
        )

    return replace(group, trajectories=[scored(k, t) for k, t in enumerate(group.trajectories)])


def make_config(checkpoint: Path, **sections: Any) -> RunConfig:
    base: dict[str, Any] = {
        "model": {"path": str(checkpoint), "vocab_multiple": 4},
        "batch": {"max_tokens": 64},
        # Adam divides by the gradient's size: with its usual ε, gradients that are rounding noise alone (1e-9) would
        # move weights by a part of a learning rate in the first update.
        "optimizer": {"lr": 1e-3, "schedule": "linear", "warmup_steps": 2, "eps": 1e-5},
        "data": {"max_prompt_tokens": 20, "max_response_tokens": 20},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return RunConfig.model_validate(base)


def scale_of(config: RunConfig) -> tuple[ScoreTree, list[float]]:
    """Tokens and values of the configured scale: the digits are 10 to 19, the point 20. By default three scores of one
    token."""
    if config.scale == ScaleConfig():
        return ScoreTree.of_tokens(SCORE_IDS), SCORE_VALUES
    spellings = [[[10 + "0123456789.".index(character) for character in text]] for text in config.scale.scores]
    return ScoreTree(spellings, [EOS] * len(config.scale.ends)), [float(text) for text in config.scale.scores]


def groups_of(config: RunConfig, seed: int, sampled: bool) -> list[Group]:
    """`make_groups`. Where the scale has scores of several tokens, two responses of each group begin alike."""
    tree, values = scale_of(config)
    if tree.flat:
        return make_groups(seed=seed, sampled=sampled)
    rng = random.Random(seed)
    groups = make_groups(seed=seed)
    for group in groups:
        group.label = rng.choice(values)
        beginning = [rng.randrange(VOCAB) for _ in range(17)]
        group.trajectories = [t if k == 1 else _longer(t, beginning, 0) for k, t in enumerate(group.trajectories)]
    if not sampled:
        return groups

    def behind(k: int, group: Group) -> list[int]:
        """The label's score, an ended one, another, the beginning of one, or none."""
        path = tree.paths[values.index(group.label) if k == 0 else rng.randrange(tree.size)]
        said = path if k == 0 else rng.choice([path, path[:1], (EOS,)])
        return [*path, EOS][: tree.read([*path, EOS])[1]] if said == path else [*said, 4]

    return [
        replace(
            group,
            trajectories=[
                t if t.answer_index is None else _longer(t, behind(k, group), len(t.response_ids))
                for k, t in enumerate(group.trajectories)
            ],
        )
        for group in groups
    ]


def _longer(t: Trajectory, ids: list[int], at: int) -> Trajectory:
    """The trajectory with these tokens put in."""

    def put(values: list, more: list) -> list:
        return [*values[:at], *more, *values[at:]]

    return replace(
        t,
        response_ids=put(t.response_ids, ids),
        answer_index=None if t.answer_index is None else t.answer_index + (0 if at else len(ids)),
        loss_mask=put(t.loss_mask, [True] * len(ids)),
        old_logprobs=put(t.old_logprobs, [-2.2] * len(ids)),
        ref_logprobs=put(t.ref_logprobs, [-2.7] * len(ids)),
    )


def make_policy(config: RunConfig) -> Policy:
    return Policy(config, *scale_of(config), total_updates=10)


def train(config: RunConfig, steps: int = 3) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics of each step, and the weights after the last one."""
    policy = make_policy(config)
    objective = build_objective(config.objective)
    sampled = getattr(objective, "needs_sampled_scores", False)
    curve = [policy.train_step(groups_of(config, step, sampled), objective) for step in range(steps)]
    return curve, {name: tensor.clone() for name, tensor in policy.export()}


def train_with_moments_allocated(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """`train`, with Adam's moments there before the first step."""
    real_step = Policy.train_step

    def step(policy: Policy, *args) -> dict[str, float]:
        policy.allocate_optimizer_state()
        moments = [len(state) for adam in chained(policy.optimizer) for state in adam.optimizer.state.values()]
        assert moments and set(moments) == {3}
        return real_step(policy, *args)

    Policy.train_step = step
    try:
        return train(config)
    finally:
        Policy.train_step = real_step


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the structure of Transformer Engine's: the steps are counted in the groups."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            done = group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                if not self.state[p]:
                    self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                mean, square = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                mean.lerp_(p.grad, 1 - beta1)
                square.lerp_(p.grad**2, 1 - beta2)
                scale = (square / (1 - beta2**done)).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean / (1 - beta1**done), scale, value=-group["lr"])


def moments_before_and_after_a_step(configs: list[RunConfig], fused: bool) -> list[tuple[set[int], set[int]]]:
    """Per configuration the addresses of Adam's moments: allocated before the first step, and after that step. fused:
    with `FusedAdam` in the place of torch's."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if fused:
            patch.setattr(megatron.core.optimizer, "Adam", FusedAdam)
            patch.setattr(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
            patch.setattr(megatron.core.optimizer.distrib_optimizer, "Adam", FusedAdam)
        for config in configs:
            policy = make_policy(config)
            adams = [one.optimizer for one in chained(policy.optimizer)]
            assert all(isinstance(adam, FusedAdam) == fused for adam in adams)

            def moments(adams: list[torch.optim.Optimizer] = adams) -> set[int]:
                states = [state for adam in adams for state in adam.state.values()]
                return {state[name].data_ptr() for state in states for name in ("exp_avg", "exp_avg_sq")}

            policy.allocate_optimizer_state()
            early = moments()
            policy.train_step(make_groups(), build_objective(config.objective))
            found.append((early, moments()))
            forget_policies()
    return found


def train_all(
    configs: list[RunConfig], steps: int = 3
) -> list[tuple[list[dict[str, float]], dict[str, torch.Tensor]] | None]:
    """`train` at one configuration after another; results from rank 0 only."""
    results = []
    for config in configs:
        results.append(train(config, steps))
        forget_policies()
    return results if dist.get_rank() == 0 else [None] * len(configs)


def logprobs(config: RunConfig) -> list[list[tuple[list[float], list[float] | None]]]:
    return [
        [(t.tokens, t.scores) for t in group] for group in make_policy(config).logprobs(groups_of(config, 0, False))
    ]


def head_error(config: RunConfig) -> list[float]:
    """The largest error of the head's log-probs of tokens and of scores, against float64 of the same hidden states and
    weights."""
    errors: list[tuple[float, float]] = []

    real_head = JudgeHead.head

    def watched(self: JudgeHead, hidden: torch.Tensor, rows: HeadRows) -> torch.Tensor:
        found = real_head(self, hidden, rows)
        logits = hidden[rows.positions, 0].double() @ self.shared_embedding_or_output_weight().double().t()
        logits[: rows.tokens] /= rows.temperature
        exact = reference_gathered_log_softmax(logits[:, : self.true_vocab_size], rows.ids)
        error = (found - exact).abs()
        first = int(rows.ids.offsets[rows.tokens])
        errors.append((error[:first].max().item(), error[first:].max().item()))
        return found

    with mock.patch.object(JudgeHead, "head", watched):
        make_policy(config).logprobs(make_groups())
    return [max(kind) for kind in zip(*errors, strict=True)]


@dataclass
class Continued:
    """What two steps after saving or loading a checkpoint give."""

    metrics: list[float]
    """Loss, gradient norm and learning rate of each step."""
    random_states: list[list[int]]
    """The CPU's and those of Megatron's tracker, before the steps."""
    weights: dict[str, torch.Tensor]
    """Exported after the steps. Adam's moments take part in them; in the metrics of the first step they do not."""


def train_all_with_overlap(configs: list[RunConfig]) -> Any:
    """`train_all`, with gradients reduced while backward still runs, as `wrap_ddp` asks for with a GPU."""
    real_config = optimizer.DistributedDataParallelConfig
    asked = []

    def with_overlap(**settings: Any) -> Any:
        asked.append(settings)
        return real_config(**{**settings, "overlap_grad_reduce": True})

    optimizer.DistributedDataParallelConfig = with_overlap
    try:
        results = train_all(configs)
    finally:
        optimizer.DistributedDataParallelConfig = real_config
    assert len(asked) >= len(configs)
    return results


def train_with_fusions(config: RunConfig) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """`train`, with the fused activation and dropout that `transformer_config` asks for with a GPU."""
    real_config = model.transformer_config

    def fused(*args: Any) -> Any:
        found = real_config(*args)
        found.bias_activation_fusion = found.bias_dropout_fusion = True
        return found

    model.transformer_config = fused
    try:
        return train(config)
    finally:
        model.transformer_config = real_config


def save_as_with_a_gpu(config: RunConfig, directory: Path) -> None:
    """`Policy.save` with a CUDA generator's state, which is 16 bytes, in the place of this device's."""
    policy = make_policy(config)
    policy.train_step(make_groups(), build_objective(config.objective))
    real_layout, real_state = checkpoint._layout, torch.cuda.get_rng_state
    checkpoint._layout = lambda: {name: "cuda" if name == "device" else size for name, size in real_layout().items()}
    torch.cuda.get_rng_state = lambda device="cuda": torch.zeros(16, dtype=torch.uint8)
    try:
        policy.save(directory, {"step": 1})
    finally:
        checkpoint._layout, torch.cuda.get_rng_state = real_layout, real_state


def save_and_continue(config: RunConfig, directory: Path) -> Continued:
    """Two steps, save, two more steps."""
    policy = make_policy(config)
    objective = build_objective(config.objective)
    for step in range(2):
        policy.train_step(make_groups(seed=step), objective)
    policy.save(directory, {"step": 2})
    return _continue(policy)


def load_and_continue(config: RunConfig, directory: Path) -> tuple[dict[str, Any], Continued]:
    """Load into a fresh policy and take the steps that `save_and_continue` took last; the state that was saved."""
    policy = make_policy(config)
    torch.rand(7)
    with cpu.device_mode(), get_cuda_rng_tracker().fork():
        torch.rand(7)
    return policy.load(directory), _continue(policy)


def _continue(policy: Policy) -> Continued:
    states = [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]
    objective = build_objective(policy.config.objective)
    steps = [policy.train_step(make_groups(seed=seed), objective) for seed in (2, 3)]
    return Continued(
        [metrics[name] for metrics in steps for name in ("loss", "grad_norm", "lr")],
        [state.tolist() for state in states],
        {name: tensor.clone() for name, tensor in policy.export()},
    )

"""The trained policy: one object that holds Megatron's model, optimizer and schedule, and runs steps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor
from transformers import AutoConfig

from real_megatron import bridge
from real_megatron.batch.balance import balance, imbalance
from real_megatron.batch.packing import PackedMicrobatch, layout_of, pack, rows_of, tokens_of
from real_megatron.batch.shares import share_out
from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.objective import Metrics, Objective, ScoredBatch, Totals, merge, summarize
from real_megatron.policy import checkpoint, cpu, flops, runtime
from real_megatron.policy.forward import run_microbatches
from real_megatron.policy.model import build_model
from real_megatron.policy.optimizer import allocate_moments, build_optimizer, build_scheduler, wrap_ddp


@dataclass
class TrajectoryLogprobs:
    """What a forward pass says about one trajectory."""

    tokens: list[float]
    """log π(token) of each loss-carrying response token (natural log)."""
    scores: list[float] | None
    """log π(k) of each score at the answer position, or None without an answer."""


class Policy:
    """A Megatron-Core model that trains on groups.

    Every rank of the run holds one and calls the same methods with the same arguments: they are collective.

    config: the run's configuration; `config.model.path` names a Hugging Face checkpoint, whose weights are loaded.
    score_ids, score_values: vocabulary ids and numeric values of the scores, lowest first.
    updates: optimizer updates of the whole run, for the learning-rate schedule.
    """

    def __init__(
        self, config: RunConfig, score_ids: Sequence[int], score_values: Sequence[float], updates: int
    ) -> None:
        self.config = config
        self.score_ids = list(score_ids)
        self.runtime = runtime.initialize(config.parallel, config.seed)
        self.values = torch.tensor(score_values, dtype=torch.float32, device=self.runtime.device)
        self.description = bridge.describe(AutoConfig.from_pretrained(config.model.path))
        self.chunks = build_model(self.description, config.parallel, config.model)
        bridge.load_hf(self.chunks, self.description, config.model.path)
        with cpu.device_mode():
            self.ddp_chunks = wrap_ddp(self.chunks, config.parallel)
            self.optimizer = build_optimizer(self.ddp_chunks, config.optimizer, config.parallel)
            self.scheduler = build_scheduler(self.optimizer, config.optimizer, updates)
        for chunk in self.ddp_chunks:
            chunk.config.finalize_model_grads_func = _sum_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            chunk.config.no_sync_func = (
                [c.no_sync for c in self.ddp_chunks] if len(self.ddp_chunks) > 1 else chunk.no_sync
            )

    def train_step(self, groups: Sequence[Group], objective: Objective) -> dict[str, float]:
        """One optimizer update on the global batch `groups` (the same list on every rank).

        Returns the objective's metrics over the global batch, and `grad_norm`, `lr`, `microbatches`, `split_groups`,
        `imbalance` (share of the busiest data-parallel rank's work for which the average one waits), `tokens` (run
        through the model, a scoring pass included), `information_tokens` (prompts once, and responses) and
        `model_flops` (of those, forward and backward). Raises FloatingPointError, on every rank and before the weights
        are touched, when the loss or the gradient norm is not finite.
        """
        totals = Totals(
            groups=len(groups),
            trajectories=sum(len(group.trajectories) for group in groups),
            tokens=sum(sum(t.loss_mask) for group in groups for t in group.trajectories),
        )
        microbatches, plan_metrics = self._plan(groups, objective)

        def consume(microbatch: PackedMicrobatch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return objective(self._scored(microbatch, logprobs), totals)

        with cpu.device_mode():
            for chunk in self.ddp_chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        results = run_microbatches(self.ddp_chunks, microbatches, consume, self.runtime.device)
        metrics = self._reduce(results)
        loss = metrics["loss"]
        with cpu.device_mode():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise FloatingPointError(
                    f"loss {loss}, gradient norm {grad_norm}: not finite. The weights are as before this step; resume "
                    "from the last checkpoint with a lower optimizer.lr, or look at this batch's rows."
                )
            self.optimizer.step()
            self.scheduler.step(increment=1)
        return {
            **metrics,
            **plan_metrics,
            "grad_norm": grad_norm,
            "lr": self.optimizer.param_groups[0]["lr"],
        }

    def logprobs(self, groups: Sequence[Group]) -> list[list[TrajectoryLogprobs]]:
        """Forward only: log-probs of every group's trajectories, on every rank."""
        pieces = [piece for group in groups for piece in self._cut(group)]
        plan, _ = self._balance(pieces)
        mine = plan[self.runtime.data_rank]

        def consume(microbatch: PackedMicrobatch, logprobs: Tensor) -> tuple[Tensor, list[TrajectoryLogprobs]]:
            return logprobs.new_zeros(()), _per_trajectory(microbatch, logprobs.float().cpu(), len(self.score_ids))

        with torch.no_grad():
            for chunk in self.ddp_chunks:
                chunk.eval()
            microbatches = [self._pack([pieces[i] for i in items]) for items in mine]
            results = run_microbatches(self.ddp_chunks, microbatches, consume, self.runtime.device, forward_only=True)
        found: dict[int, list[TrajectoryLogprobs]] = {}
        for items, result in zip(mine, results, strict=False):
            remaining = iter(result)
            for item in items:
                found[item] = [next(remaining) for _ in pieces[item].trajectories]
        merged = self._merge(found)
        ordered = iter(merged[i] for i in range(len(pieces)))
        return [[t for _ in self._cut(group) for t in next(ordered)] for group in groups]

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as a stream of (Hugging Face name, full tensor), on every rank."""
        return bridge.export_hf(self.chunks, self.description)

    def allocate_optimizer_state(self) -> None:
        """Take the memory of Adam's moments now, before somebody else is given what is free."""
        allocate_moments(self.optimizer)

    def save(self, directory: str | Path, state: dict[str, Any]) -> None:
        """Write a training checkpoint with the caller's `state` (plain data)."""
        checkpoint.save(directory, self.chunks, self.optimizer, self.scheduler, state)

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Continue from a training checkpoint, written at this or another parallel layout; returns its `state`."""
        return checkpoint.load(directory, self.chunks, self.optimizer, self.scheduler)

    def _scored(self, microbatch: PackedMicrobatch, logprobs: Tensor) -> ScoredBatch:
        device, scores = self.runtime.device, len(self.score_ids)
        tokens = microbatch.token_trajectory.numel()
        answers = logprobs[tokens:].view(-1, scores)
        answered = microbatch.answer_trajectory.to(device)
        count = microbatch.num_trajectories
        has_answer = torch.zeros(count, dtype=torch.bool, device=device)
        has_answer[answered] = True

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return ScoredBatch(
            token_logprobs=logprobs[:tokens],
            token_trajectory=microbatch.token_trajectory.to(device),
            score_logprobs=answers.new_zeros(count, scores).index_copy(0, answered, answers),
            has_answer=has_answer,
            labels=microbatch.labels.to(device),
            group=microbatch.group.to(device),
            values=self.values,
            old_logprobs=move(microbatch.old_logprobs),
            ref_logprobs=move(microbatch.ref_logprobs),
            advantages=move(microbatch.advantages),
        )

    def _pack(self, groups: Sequence[Group]) -> PackedMicrobatch:
        parallel = self.config.parallel
        multiple = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
        microbatch = pack(groups, self.score_ids, self.config.batch.share_prompt, multiple)
        if parallel.context == 1:
            return microbatch
        costs = flops.uneven_flops(self.description, microbatch.layout, microbatch.row_positions)
        return replace(microbatch, shares=share_out(costs, parallel.context))

    def _balance(self, groups: Sequence[Group]) -> tuple[list[list[list[int]]], list[float]]:
        """Micro-batches per data-parallel rank, and each group's training FLOPs, which the plan evens out."""
        parallel, share = self.config.parallel, self.config.batch.share_prompt
        costs = [self._flops(group, share) for group in groups]
        plan = balance(
            costs,
            [tokens_of(group, share) for group in groups],
            self.config.batch.max_tokens,
            self.runtime.data_size,
            multiple=parallel.pipeline if parallel.virtual_pipeline else 1,
        )
        return plan, costs

    def _flops(self, group: Group, share_prompt: bool) -> float:
        return flops.training_flops(self.description, layout_of(group, share_prompt), rows_of(group))

    def _plan(self, groups: Sequence[Group], objective: Objective) -> tuple[list[PackedMicrobatch], dict[str, float]]:
        """This rank's micro-batches of the global batch, and what the plan looks like.

        Groups beyond the token budget are split; where rewards are compared within groups, a scoring pass computes the
        pieces' advantages first. Pieces and whole groups do not share a micro-batch: the first bring advantages.
        """
        share = self.config.batch.share_prompt
        large = [group for group in groups if tokens_of(group, share) > self.config.batch.max_tokens]
        whole = [group for group in groups if tokens_of(group, share) <= self.config.batch.max_tokens]
        if large and objective.needs_advantages:
            large = self._with_advantages(large, objective)
        pieces = [piece for group in large for piece in self._cut(group)]
        microbatches: list[PackedMicrobatch] = []
        count, waiting, work = 0, 0.0, 0.0
        for part in (whole, pieces):
            if not part:
                continue
            plan, costs = self._balance(part)
            microbatches += [self._pack([part[i] for i in items]) for items in plan[self.runtime.data_rank]]
            count += sum(len(mine) for mine in plan)
            waiting += imbalance(costs, plan) * sum(costs)
            work += sum(costs)
        scored = sum(tokens_of(group, share) for group in large) if objective.needs_advantages else 0
        return microbatches, {
            "microbatches": float(count),
            "imbalance": waiting / work,
            "tokens": float(sum(tokens_of(group, share) for group in [*whole, *pieces]) + scored),
            "information_tokens": float(sum(tokens_of(group) for group in groups)),
            "model_flops": sum(self._flops(group, share_prompt=True) for group in groups),
            "split_groups": float(len(large)),
        }

    def _with_advantages(self, groups: Sequence[Group], objective: Objective) -> list[Group]:
        """The groups, each trajectory with the advantage that a scoring pass gives it."""
        scores = [t.scores for group in self.logprobs(groups) for t in group]
        zeros = [0.0] * len(self.score_ids)
        group_index = torch.tensor([g for g, group in enumerate(groups) for _ in group.trajectories])
        scored = ScoredBatch(
            token_logprobs=torch.zeros(0),
            token_trajectory=torch.zeros(0, dtype=torch.long),
            score_logprobs=torch.tensor([zeros if s is None else s for s in scores]),
            has_answer=torch.tensor([s is not None for s in scores]),
            labels=torch.tensor([group.label for group in groups for _ in group.trajectories]),
            group=group_index,
            values=self.values.cpu(),
        )
        advantages = iter(objective.advantages(objective.rewards(scored), group_index).tolist())
        return [
            replace(group, trajectories=[replace(t, advantage=next(advantages)) for t in group.trajectories])
            for group in groups
        ]

    def _cut(self, group: Group) -> list[Group]:
        """The group, or pieces of it that fit the token budget (a single trajectory always makes a piece)."""
        share = self.config.batch.share_prompt
        if tokens_of(group, share) <= self.config.batch.max_tokens:
            return [group]
        pieces: list[Group] = []
        for trajectory in group.trajectories:
            grown = replace(group, trajectories=[*pieces[-1].trajectories, trajectory]) if pieces else None
            if grown and tokens_of(grown, share) <= self.config.batch.max_tokens:
                pieces[-1] = grown
            else:
                pieces.append(replace(group, trajectories=[trajectory]))
        return pieces

    def _reduce(self, results: Sequence[Metrics]) -> dict[str, float]:
        """Merge metrics over micro-batches and data-parallel ranks; tell every pipeline stage."""
        reduced: dict[str, float] = {}
        if self.runtime.is_last_stage:
            mine = {name: value.cpu() for name, value in merge(results).items()}
            everyone: list[Any] = [None] * self.runtime.data_size
            dist.all_gather_object(everyone, mine, group=parallel_state.get_data_parallel_group())
            reduced = summarize(merge(everyone))
        return self._from_last_stage(reduced)

    def _merge(self, found: dict[int, Any]) -> dict[int, Any]:
        """Union of the data-parallel ranks' dictionaries, from the last stage to every rank."""
        merged: dict[int, Any] = {}
        if self.runtime.is_last_stage:
            everyone: list[Any] = [None] * self.runtime.data_size
            dist.all_gather_object(everyone, found, group=parallel_state.get_data_parallel_group())
            for part in everyone:
                merged.update(part)
        return self._from_last_stage(merged)

    def _from_last_stage(self, value: Any) -> Any:
        holder = [value]
        dist.broadcast_object_list(
            holder,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return holder[0]


def _sum_model_grads(chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by a token count: the objective has divided already."""
    finalize_model_grads(chunks, None, **kwargs)


def _per_trajectory(microbatch: PackedMicrobatch, logprobs: Tensor, scores: int) -> list[TrajectoryLogprobs]:
    results = [TrajectoryLogprobs([], None) for _ in range(microbatch.num_trajectories)]
    tokens = microbatch.token_trajectory.numel()
    for trajectory, value in zip(microbatch.token_trajectory.tolist(), logprobs[:tokens].tolist(), strict=True):
        results[trajectory].tokens.append(value)
    answers = logprobs[tokens:].view(-1, scores).tolist()
    for trajectory, values in zip(microbatch.answer_trajectory.tolist(), answers, strict=True):
        results[trajectory].scores = values
    return results

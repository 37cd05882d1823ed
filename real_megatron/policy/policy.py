"""The trained policy: one object that holds Megatron's model, optimizer and schedule, and runs steps.

Every public method is collective: all ranks of the run call it, with the same arguments. Within a step the ranks
communicate in this order, the same on all of them:

1. Scoring pass, only where a group is beyond the token budget and its rewards are compared: see `logprobs`.
2. Forward and backward passes. Tensor-, pipeline- and context-parallel ranks of one data-parallel rank run the same
   micro-batches together. Data-parallel ranks run different micro-batches, but equally many.
3. At their end Megatron sums the gradients, over data- and context-parallel ranks alike: each context-parallel rank
   has the gradients of its own tokens, each data-parallel rank those of its own micro-batches.
4. Metrics: data-parallel ranks merge theirs on the last pipeline stage, which then tells the other stages.
   Context-parallel ranks are not merged: they have all computed the whole objective (policy/context.py).
5. The gradient norm, over all ranks; then whether the update is made (policy/update_guard.py): all ranks make it, or
   none.
6. The optimizer's step, after which data-parallel ranks gather the weights that each of them has updated.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from real_megatron import bridge, progress
from real_megatron.batch.packing import PackedMicrobatch, labels_of, responses_of, sampled_scores
from real_megatron.batch.score_logprobs import score_logprobs
from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.objective import (
    GroupObjective,
    MetricSums,
    NotFinite,
    Objective,
    ResponseView,
    ScoredBatch,
    Totals,
    merge,
    summarize,
)
from real_megatron.policy import checkpoint, cpu, parallel_groups
from real_megatron.policy.forward import run_microbatches
from real_megatron.policy.gathering import broadcast_from, gather_metrics, gather_uneven
from real_megatron.policy.model import build_model, check_model
from real_megatron.policy.optimizer import allocate_moments, build_optimizer, build_scheduler, chained, wrap_ddp
from real_megatron.policy.pending_save import PendingSave
from real_megatron.policy.plan import Planner
from real_megatron.policy.update_guard import Fault, UpdateGuard
from real_megatron.scores import Aspect, ScoreTree


@dataclass
class TrajectoryLogprobs:
    """What a forward pass says about one trajectory."""

    tokens: list[float]
    """log π(token) of each loss-carrying response token (natural log), at the temperature that responses are sampled
    with."""
    scores: list[float] | None
    """log π(k) of each score at the answer position, at temperature 1, or None without an answer."""


class Policy:
    """A Megatron-Core model that trains on groups.

    Every rank of the run holds one and calls the same methods with the same arguments: they are collective.

    config: the run's configuration; `config.model.path` names a Hugging Face checkpoint, whose weights are loaded.
    tree, values, aspects: the scores' tokens, their numeric values, and where there are several aspects whose they are.
    total_updates: optimizer updates of the whole run, for the learning-rate schedule.
    model_dir: the directory of that checkpoint, where the caller has found it already.

    Raises ConfigError for parallel sizes that do not divide the ranks or the model, for a warm-up longer than the run,
    and where `data` admits longer sequences than the model's rotary embedding; UnsupportedModel and CheckpointError for
    a checkpoint that cannot be trained.
    """

    def __init__(
        self,
        config: RunConfig,
        tree: ScoreTree,
        values: Sequence[float],
        total_updates: int,
        model_dir: Path | None = None,
        aspects: Sequence[Aspect] = (),
    ) -> None:
        self.config = config
        self.tree, self.aspects = tree, aspects
        self.runtime = parallel_groups.initialize(config.parallel, config.seed)
        # The policy that reinforcement learning trains is the one that its responses were sampled from.
        self.temperature = config.rollout.temperature if config.is_rl else 1.0
        self.values = torch.tensor(values, dtype=torch.float32, device=self.runtime.device)
        self.model_dir = model_dir or checkpoint_directory(config.model.path, config.model.revision)
        self.description = check_model(config, self.model_dir)
        self.planner = Planner(
            self.description, tree, config.parallel, config.batch, self.runtime.data_rank, self.runtime.data_size
        )
        self.chunks = build_model(self.description, config.parallel, config.model)
        bridge.load_hf(self.chunks, self.description, self.model_dir)
        with cpu.device_mode():
            self.ddp_chunks = wrap_ddp(self.chunks, config.parallel)
            self.optimizer = build_optimizer(self.ddp_chunks, config.optimizer, config.parallel)
            self.scheduler = build_scheduler(self.optimizer, config.optimizer, total_updates)
        self.guard = UpdateGuard(config.optimizer)
        for chunk in self.ddp_chunks:
            chunk.config.finalize_model_grads_func = _sum_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
            chunk.config.no_sync_func = (
                [c.no_sync for c in self.ddp_chunks] if len(self.ddp_chunks) > 1 else chunk.no_sync
            )

    def train_step(self, groups: Sequence[Group], objective: Objective) -> dict[str, float]:
        """One optimizer update on the global batch `groups` (the same list on every rank).

        Returns the objective's metrics over the global batch, the plan's (`Planner.plan`), `grad_norm` and `lr`, the
        rate of this update, and `skipped_updates`: 0. An update whose loss or gradient norm is not finite, or a spike,
        is skipped on every rank: weights, optimizer and schedule are as before. It returns the plan's metrics and
        `skipped_updates`: 1 alone; `guard.last` says why. Raises FloatingPointError, on every rank and before the
        weights are touched, for one more than `optimizer.max_skipped` in a row.
        """
        faults: list[Fault] = []
        totals = Totals(
            groups=len(groups),
            trajectories=sum(len(group.trajectories) for group in groups),
            tokens=sum(sum(t.loss_mask) for group in groups for t in group.trajectories),
        )
        if objective.needs_advantages:
            assert isinstance(objective, GroupObjective), "an objective that needs advantages computes them"
            try:
                groups = self._with_advantages(groups, objective)
            except FloatingPointError as error:  # on every rank: all have the same scores
                faults.append(Fault(str(error)))
        plan = self.planner.plan(groups, scoring_pass=objective.needs_advantages)

        def consume(microbatch: PackedMicrobatch, logprobs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            try:
                return objective(self._scored(microbatch, logprobs), totals)
            except FloatingPointError as error:
                # Not raised: the other ranks would wait for this one's gradients. As NaN it reaches all of them.
                faults.append(_fault(error, microbatch))
                poison = logprobs.sum() * math.nan
                return poison, {"loss": poison.detach().expand(2)}

        with cpu.device_mode():
            for chunk in self.ddp_chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        metrics, grad_norm = {"loss": math.nan}, math.nan
        if not faults:
            results = run_microbatches(
                self.ddp_chunks, plan.microbatches, consume, self.runtime.device, temperature=self.temperature
            )
            metrics = self._reduce(results)
            with cpu.device_mode():
                self.optimizer.prepare_grads()
                grad_norm = float(self.optimizer.get_grad_norm())
            if not math.isfinite(metrics["loss"]) and not faults:
                faults += [
                    Fault("", microbatch.examples)
                    # Not strict: only the last pipeline stage has results.
                    for microbatch, result in zip(plan.microbatches, results, strict=False)
                    if not bool(result["loss"].isfinite().all())
                ]
        if self.guard.skips(metrics["loss"], grad_norm, faults, [group.example_id for group in groups]):
            return {**plan.metrics, "skipped_updates": 1.0}
        with cpu.device_mode():
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.scheduler.step(increment=1)
        return {
            **metrics,
            **plan.metrics,
            "grad_norm": grad_norm,
            "lr": lr,
            "skipped_updates": 0.0,
        }

    def logprobs(self, groups: Sequence[Group]) -> list[list[TrajectoryLogprobs]]:
        """Forward only: log-probs of every group's trajectories, on every rank."""
        split = [self.planner.split(self.planner.token_tree(group)) for group in groups]
        subgroups = [part for parts in split for part in parts]
        plan = self.planner.distribute(subgroups)

        def consume(microbatch: PackedMicrobatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
            sampled, scores = self._of_tokens_and_scores(microbatch, logprobs)
            return logprobs.new_zeros(()), torch.cat((sampled, scores.flatten())).float().cpu()

        with torch.no_grad():
            for chunk in self.ddp_chunks:
                chunk.eval()
            results = run_microbatches(
                self.ddp_chunks,
                [self.planner.pack([subgroups[i] for i in items]) for items in plan[self.runtime.data_rank]],
                consume,
                self.runtime.device,
                forward_only=True,
                temperature=self.temperature,
            )
        # All ranks know the plan, and so how many log-probs each data-parallel rank has, of what.
        sizes = [sum(self._numbers(subgroups[i].group) for items in one for i in items) for one in plan]
        everything = self._gathered(torch.cat([torch.empty(0), *results]), sizes)
        found: dict[int, list[TrajectoryLogprobs]] = {}
        for one, numbers in zip(plan, everything, strict=True):
            values = iter(numbers.tolist())
            for items in one:
                rows = _per_trajectory([subgroups[i].group for i in items], values, self.tree.size)
                found |= zip(items, rows, strict=True)
        ordered = iter(found[i] for i in range(len(subgroups)))
        return [[t for _ in parts for t in next(ordered)] for parts in split]

    def scored(self, groups: Sequence[Group]) -> ScoredBatch:
        """What `GroupObjective.rewards` reads of the groups: score log-probs and labels of all their trajectories in
        order, without gradient, without token log-probs. On the host, on every rank. Forward only. Collective."""
        scores = [t.scores for group in self.logprobs(groups) for t in group]
        zeros = [0.0] * self.tree.size
        return ScoredBatch(
            token_logprobs=torch.zeros(0),
            token_trajectory=torch.zeros(0, dtype=torch.long),
            score_logprobs=torch.tensor([zeros if s is None else s for s in scores]),
            has_answer=torch.tensor([s is not None for s in scores]),
            labels=labels_of(groups),
            group=torch.tensor([g for g, group in enumerate(groups) for _ in group.trajectories]),
            values=self.values.cpu(),
            aspects=self.aspects,
            sampled=sampled_scores(groups, self.tree),
            responses=_views(responses_of(groups)),
        )

    def export(self, everywhere: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The weights as a stream of (Hugging Face name, full tensor), on every rank or on rank 0 alone. Every rank
        runs it to its end."""
        for named in bridge.export_hf(self.chunks, self.description, everywhere=everywhere):
            progress.mark()
            yield named

    def allocate_optimizer_state(self) -> None:
        """Allocate Adam's moments now, before a rollout server takes the memory that is free."""
        allocate_moments(chained(self.optimizer))

    def save(self, directory: str | Path, state: dict[str, Any]) -> None:
        """Write a training checkpoint with the caller's `state` (plain data)."""
        checkpoint.save(directory, *self._to_save(state))

    def begin_save(self, directory: str | Path, state: dict[str, Any]) -> PendingSave:
        """`save`, of which the files of tensors are written while training goes on."""
        return checkpoint.begin_save(directory, *self._to_save(state))

    def _to_save(self, state: dict[str, Any]) -> tuple[Any, ...]:
        # Before the first update that was made there is no state, which Megatron could not save.
        self.allocate_optimizer_state()
        return self.chunks, self.optimizer, self.scheduler, {**state, "guard": self.guard.state()}

    def load(self, directory: str | Path) -> dict[str, Any]:
        """Continue from a training checkpoint, written at this or another parallel layout; returns its `state`."""
        state = checkpoint.load(directory, self.chunks, self.optimizer, self.scheduler)
        self.guard.load(state.pop("guard"))
        return state

    def _scored(self, microbatch: PackedMicrobatch, logprobs: Tensor) -> ScoredBatch:
        device = self.runtime.device
        sampled, scores = self._of_tokens_and_scores(microbatch, logprobs)
        answered = microbatch.answer_trajectory.to(device)
        count = microbatch.num_trajectories
        has_answer = torch.zeros(count, dtype=torch.bool, device=device)
        has_answer[answered] = True

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        return ScoredBatch(
            token_logprobs=sampled,
            token_trajectory=microbatch.token_trajectory.to(device),
            score_logprobs=scores.new_zeros(count, self.tree.size).index_copy(0, answered, scores),
            has_answer=has_answer,
            labels=microbatch.labels.to(device),
            group=microbatch.group.to(device),
            values=self.values,
            aspects=self.aspects,
            old_logprobs=move(microbatch.old_logprobs),
            ref_logprobs=move(microbatch.ref_logprobs),
            advantages=move(microbatch.advantages),
            sampled=move(microbatch.sampled),
            responses=_views(microbatch.responses),
        )

    def _of_tokens_and_scores(self, microbatch: PackedMicrobatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """A micro-batch's log-probs `[nnz]` as those of its loss-carrying tokens `[N_tok]` and of each score at its
        answers `[N_answer, S]`."""
        tokens = microbatch.token_trajectory.numel()
        return logprobs[:tokens], score_logprobs(self.tree, logprobs[tokens:].view(-1, self.tree.width))

    def _with_advantages(self, groups: Sequence[Group], objective: GroupObjective) -> list[Group]:
        """The groups, those beyond the token budget with the advantages that a scoring pass gives their trajectories.

        The responses of such a group are split over micro-batches, perhaps of different ranks, but their rewards are
        compared with each other: all of them must be known first.
        """
        fits = [self.planner.fits(self.planner.token_tree(group)) for group in groups]
        if all(fits):
            return list(groups)
        scored = self.scored([group for group, whole in zip(groups, fits, strict=True) if not whole])
        advantages = iter(objective.advantages(scored).tolist())

        def with_advantages(group: Group) -> Group:
            return replace(group, trajectories=[replace(t, advantage=next(advantages)) for t in group.trajectories])

        return [group if whole else with_advantages(group) for group, whole in zip(groups, fits, strict=True)]

    def _reduce(self, results: Sequence[MetricSums]) -> dict[str, float]:
        """Metrics over all micro-batches and data-parallel ranks, on every rank. Collective."""
        reduced: dict[str, float] = {}
        if self.runtime.is_last_stage:
            group = parallel_state.get_data_parallel_group()
            reduced = summarize(merge(gather_metrics(merge(results), group, self.runtime.device)))
        holder = [reduced]
        dist.broadcast_object_list(
            holder,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        return holder[0]

    def _numbers(self, group: Group) -> int:
        """How many log-probs of tokens and scores a forward pass gives of a group."""
        answers = sum(t.answer_index is not None for t in group.trajectories)
        return sum(sum(t.loss_mask) for t in group.trajectories) + answers * self.tree.size

    def _gathered(self, mine: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Vectors of `sizes` float32 numbers, which the data-parallel ranks have on the last stage, on every rank.
        Collective."""
        device, flat = self.runtime.device, None
        if self.runtime.is_last_stage:
            flat = torch.cat(gather_uneven(mine, sizes, parallel_state.get_data_parallel_group(), device))
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        stages = parallel_state.get_pipeline_model_parallel_group()
        return broadcast_from(flat, sum(sizes), last, stages, device).split(list(sizes))


def _sum_model_grads(chunks: list[torch.nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's gradient reduction without its division by a token count: the objective has divided already."""
    finalize_model_grads(chunks, None, **kwargs)


def _fault(error: FloatingPointError, microbatch: PackedMicrobatch) -> Fault:
    """An objective's error, with the ids of the data rows that it is about."""
    examples = microbatch.examples
    return Fault(str(error), [examples[i] for i in error.trajectories] if isinstance(error, NotFinite) else examples)


def _per_trajectory(groups: Sequence[Group], values: Iterator[float], scores: int) -> list[list[TrajectoryLogprobs]]:
    """The log-probs of a micro-batch's groups: those of all tokens, then those of each answer's scores."""
    rows = [
        [TrajectoryLogprobs(list(islice(values, sum(t.loss_mask))), None) for t in group.trajectories]
        for group in groups
    ]
    for group, row in zip(groups, rows, strict=True):
        for trajectory, found in zip(group.trajectories, row, strict=True):
            if trajectory.answer_index is not None:
                found.scores = list(islice(values, scores))
    return rows


def _views(responses: Sequence[tuple[str, dict[str, Any]]] | None) -> list[ResponseView] | None:
    return None if responses is None else [ResponseView(text, meta) for text, meta in responses]

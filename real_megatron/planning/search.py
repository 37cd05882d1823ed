"""The best layouts of a model on a number of GPUs: all that divide are tried, those that fit are ranked by time."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from real_megatron.bridge import ModelDescription
from real_megatron.bridge.description import divisors
from real_megatron.config import ModelConfig, ParallelConfig, RolloutConfig
from real_megatron.errors import ConfigError
from real_megatron.hardware import Gpu
from real_megatron.planning.memory import LayoutMemory, full_microbatch, layout_memory, smallest_server
from real_megatron.planning.microbatches import microbatches
from real_megatron.planning.servers import Servers, server_memory
from real_megatron.planning.states import LocalSizes, state_bytes
from real_megatron.planning.step_time import StepTime, step_time
from real_megatron.planning.workload import Layout, Workload
from real_megatron.policy.meta import StateBytes
from real_megatron.policy.stages import chunk_count, counted_layers

Placement = str
"""`colocated`: servers on the trainer's GPUs; `separate`: on GPUs of their own; `auto`: whichever is faster."""
PLACEMENTS = ("auto", "colocated", "separate")
SAME_TIME = 0.10
"""Projected times that differ by less are taken to be the same, since projections are no better (docs/scaling.md): the
simpler layout then wins."""
LARGEST_PIPELINE = 16
LARGEST_VIRTUAL_PIPELINE = 8
CONTEXTS = (1, 2, 4, 8)
LARGEST_BUDGET = 2**17
"""Tokens of a micro-batch: beyond, its own work is large enough to hide every fixed cost."""


@dataclass(frozen=True)
class Candidate:
    """One way to spread a run over its GPUs."""

    layout: Layout
    workload: Workload
    """With the token budget of this candidate."""
    servers: Servers | None
    memory: LayoutMemory
    time: StepTime

    @property
    def gpus(self) -> int:
        """All GPUs, the servers' too."""
        separate = 0 if self.servers is None or self.servers.colocated else self.servers.gpus
        return self.layout.world + separate


@dataclass(frozen=True)
class Found:
    """What a search has seen."""

    best: list[Candidate]
    """Those that fit, as `_ranked` orders them; of several with the same sizes of parallelism only the fastest."""
    tried: int
    """Layouts that divide model and GPUs."""
    fitting: int
    closest: Candidate | None
    """Where none fits: the one that misses by the least."""


def best_layouts(
    description: ModelDescription,
    gpus: int,
    gpu: Gpu,
    workload: Workload,
    model: ModelConfig | None = None,
    placement: Placement = "auto",
    count: int = 5,
    rollout: RolloutConfig | None = None,
    parallel: ParallelConfig | None = None,
) -> Found:
    """Search the layouts of `gpus` GPUs, servers included.

    workload: its `max_tokens` is not read: every budget from one longest response on is tried. model, rollout,
    parallel: what is not searched (recomputation, sizes and placement are); default: the configuration's defaults.
    Raises ConfigError for a placement that is not known.
    """
    if placement not in PLACEMENTS:
        raise ConfigError(f"placement {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    model, rollout, kept = model or ModelConfig(), rollout or RolloutConfig(), parallel or ParallelConfig()
    tried = fitting = 0
    fastest: dict[tuple[object, ...], Candidate] = {}
    closest: Candidate | None = None
    known = _States(description, model)
    for servers, world in _placements(description, gpus, gpu, workload, placement, rollout):
        for parallel in _parallel_sizes(description, world, gpu, workload, kept, model):
            states = known.of(parallel, world)
            for budget in _budgets(workload, parallel):
                one = None
                for recompute in ("none", "full"):  # which is slower: not tried where the first fits
                    tried += 1
                    chosen = model.model_copy(update={"recompute": recompute})
                    layout, work = Layout(description, parallel, chosen, world), replace(workload, max_tokens=budget)
                    memory = candidate_memory(layout, work, gpu, servers, states)
                    if memory.fits or (not fitting and recompute == "full"):
                        one = Candidate(layout, work, servers, memory, step_time(layout, work, gpu, servers))
                        break
                if one is None or not one.memory.fits:
                    if one and (closest is None or one.memory.fullest.peak < closest.memory.fullest.peak):
                        closest = one
                    break  # larger micro-batches take more, unless rounding leaves far fewer of them in flight
                fitting += 1
                key = (world, *_sizes(parallel), servers and servers.colocated)
                if key not in fastest or one.time.total < fastest[key].time.total:
                    fastest[key] = one
    ranked = _ranked(list(fastest.values()))
    return Found(ranked[:count], tried, fitting, None if fitting else closest)


def candidate_memory(
    layout: Layout,
    workload: Workload,
    gpu: Gpu,
    servers: Servers | None,
    states: Mapping[int, StateBytes] | None = None,
) -> LayoutMemory:
    """The memory of a candidate: with a full micro-batch of longest responses, and the servers on its GPUs."""
    count = microbatches(layout, workload, workload.updates).count
    server = 0.0
    if servers is not None and servers.colocated:
        server = smallest_server(layout.description, servers.tensor, workload)
    return layout_memory(layout, full_microbatch(layout, workload), count, gpu, server, states=states)


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Fastest first; of those that differ by less than `SAME_TIME`, the simpler ones: fewer kinds of parallelism, and
    pipelines of fewer stages, of which each doubling counts as a kind."""
    best = min((one.time.total for one in candidates), default=0.0)

    def key(one: Candidate) -> tuple[int, float, float]:
        parallel = one.layout.parallel
        kinds = sum(size > 1 for size in _sizes(parallel)) + bool(parallel.virtual_pipeline)
        slower = math.log(one.time.total / best) / math.log(1 + SAME_TIME)
        return int(slower), kinds + math.log2(parallel.pipeline), one.time.total

    return sorted(candidates, key=key)


class _States:
    """Bytes of weights, gradients and optimizer on the pipeline stages that can be the fullest, each computed once: the
    first and the last, and where the first has one layer fewer than others the second."""

    def __init__(self, description: ModelDescription, model: ModelConfig) -> None:
        self.description, self.model = description, model
        self._sizes: dict[int, LocalSizes] = {}
        self._known: dict[tuple[object, ...], dict[int, StateBytes]] = {}

    def of(self, parallel: ParallelConfig, world: int) -> dict[int, StateBytes]:
        layout = Layout(self.description, parallel, self.model, world)
        if parallel.tensor not in self._sizes:
            self._sizes[parallel.tensor] = LocalSizes.of(layout)
        key = (world, *parallel.model_dump().values())
        if key not in self._known:
            sizes = self._sizes[parallel.tensor]
            second = min(int(parallel.account_for_embedding), parallel.pipeline - 1)
            stages = sorted({0, second, parallel.pipeline - 1})
            self._known[key] = {stage: state_bytes(layout, stage, sizes=sizes) for stage in stages}
        return self._known[key]


def _sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    return (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert)


def _placements(
    description: ModelDescription,
    gpus: int,
    gpu: Gpu,
    workload: Workload,
    placement: Placement,
    rollout: RolloutConfig,
) -> Iterator[tuple[Servers | None, int]]:
    """Servers, and the training ranks that are left."""
    if not workload.generates:
        yield None, gpus
        return
    sizes = _server_sizes(description, gpu)
    kept: dict[str, Any] = {"concurrency": rollout.concurrency, "keep_weights": rollout.keep_weights}
    # A run starts servers on rank 0's node alone: colocated ones are there for one node.
    if placement != "separate" and not rollout.staleness and gpus <= gpu.per_node:
        for tensor in sizes:
            if gpus % tensor == 0:
                yield Servers(gpus, tensor, colocated=True, **kept), gpus
    if placement != "colocated":
        # Whole nodes serve where there are several.
        unit = gpu.per_node if gpus > gpu.per_node else 1
        shares = sorted({max(unit, round(gpus * eighths / 8 / unit) * unit) for eighths in (1, 2, 3, 4, 5, 6)})
        for serving, tensor in product(shares, sizes):
            if serving < gpus and serving % tensor == 0:
                yield Servers(serving, tensor, staleness=rollout.staleness, **kept), gpus - serving


def _server_sizes(description: ModelDescription, gpu: Gpu) -> list[int]:
    """Tensor-parallel sizes of a server: the smallest whose weights take at most 60 % of a GPU, and twice that."""
    sizes = [size for size in description.tensor_sizes if gpu.per_node % size == 0]
    enough = [size for size in sizes if server_memory(description, size) <= 0.6 * gpu.memory]
    return (enough or sizes[-1:])[:2]


def _parallel_sizes(
    description: ModelDescription, world: int, gpu: Gpu, workload: Workload, kept: ParallelConfig, model: ModelConfig
) -> Iterator[ParallelConfig]:
    """Every layout of `world` ranks that divides the model, with at least one group for each data-parallel rank. kept:
    has what is no size."""
    experts = divisors(description.num_experts) if description.num_experts else [1]
    tensors = [size for size in description.tensor_sizes if gpu.per_node % size == 0]
    end_options = (False, True) if model.megatron_class == "GPTModel" else (False,)  # as policy/model.py demands
    for tensor, pipeline, context, expert in product(tensors, range(1, LARGEST_PIPELINE + 1), CONTEXTS, experts):
        size = tensor * pipeline * context
        if world % size or world % (tensor * pipeline * expert):
            continue
        if world // size > workload.prompts // workload.mini_batches:
            continue
        for virtual, ends in product([None, *range(2, LARGEST_VIRTUAL_PIPELINE + 1)], end_options):
            if pipeline == 1 and (virtual or ends):
                continue
            parallel = ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                expert=expert,
                sequence_parallel=tensor > 1,
                account_for_embedding=ends,
                account_for_loss=ends,
                distributed_optimizer=kept.distributed_optimizer,
                timeout_minutes=kept.timeout_minutes,
            )
            if counted_layers(description.num_layers, parallel) % chunk_count(parallel) == 0:
                yield parallel


def _budgets(workload: Workload, parallel: ParallelConfig) -> Sequence[int]:
    """Token budgets: powers of two from the longest response's sequence on."""
    longest = workload.max_prompt_tokens + workload.max_response_tokens
    sizes = [2**power for power in range(10, LARGEST_BUDGET.bit_length()) if 2**power >= longest]
    return [size for size in sizes if size <= 2**14 * max(2, parallel.context * parallel.tensor)]

"""What a rank's GPU holds in training and in rollout, beside what it has room for."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

from real_megatron.bridge import ModelDescription
from real_megatron.config import RunConfig
from real_megatron.hardware import Gpu
from real_megatron.planning.activations import ActivationBytes, activation_bytes
from real_megatron.planning.saved_tensors import GPU, MicrobatchSize
from real_megatron.planning.servers import kv_bytes_per_token, server_memory
from real_megatron.planning.states import LocalSizes, state_bytes
from real_megatron.planning.storage import weight_bytes
from real_megatron.planning.workload import Layout, Workload, workload_of
from real_megatron.policy.meta import StateBytes, built_bytes

GIB = 2**30
COMMUNICATOR_BYTES = GIB // 4
"""Assumed for each of NCCL's communicators of more than one rank: rings of 4 MiB buffers over up to 32 channels, both
directions (NCCL_BUFFSIZE and its channels' defaults)."""
FRAGMENTATION = 0.05
"""Assumed share of activations that torch's allocator wastes between blocks of different sizes."""
EXPERT_LOAD = 1.5
"""Assumed rows of the busiest rank's experts over the mean: nothing forces the router to spread tokens evenly."""
RESERVE = 0.06
"""Share of a GPU's memory that is left free for what these estimates miss: none has been compared with a GPU yet."""
ASLEEP_BYTES = 2 * GIB
"""Assumed to stay with a colocated server that has released weights and cache: its CUDA context and graphs."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the GPU of a rank of one pipeline stage, the fullest of them."""

    stage: int
    states: StateBytes
    activations: ActivationBytes
    communication: float
    server: float
    """A colocated server's weights, and the smallest KV cache that it can work with (`smallest_server`); 0: none."""
    engine: float
    """A copy of the whole model for the engine in the trainer, which is there all the time; 0: none."""
    room: float
    """Bytes that may be used: the GPU's, without `RESERVE`."""

    @property
    def always(self) -> float:
        """What is there in every phase."""
        return self.states.total + self.communication + self.engine

    @property
    def training(self) -> float:
        """While a step trains."""
        return self.always + self.activations.total * (1 + FRAGMENTATION) + (ASLEEP_BYTES if self.server else 0)

    @property
    def rollout(self) -> float:
        """While a colocated server generates: the trainer keeps its weights, gradients and optimizer."""
        return self.always + self.server

    @property
    def peak(self) -> float:
        return max(self.training, self.rollout)

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def binds(self) -> str:
        """The largest part of the fuller phase."""
        parts: dict[str, float] = {
            "weights": self.states.weights,
            "gradients": self.states.gradients,
            "optimizer": self.states.optimizer,
            "the engine's copy of the model": self.engine,
        }
        if self.rollout > self.training:
            parts["colocated server"] = self.server
        else:
            parts["activations"] = self.activations.total
        return max(parts, key=lambda part: parts[part])


@dataclass(frozen=True)
class LayoutMemory:
    """The memory of every pipeline stage's fullest rank."""

    stages: tuple[RankMemory, ...]

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.stages, key=lambda one: one.peak)

    @property
    def fits(self) -> bool:
        return self.fullest.fits


def layout_memory(
    layout: Layout,
    microbatch: MicrobatchSize,
    microbatches: int,
    gpu: Gpu,
    server: float = 0.0,
    engine: float = 0.0,
    states: Mapping[int, StateBytes] | None = None,
) -> LayoutMemory:
    """The memory of each pipeline stage.

    microbatch: the longest one. microbatches: of a data-parallel rank in an update. server, engine: as in `RankMemory`.
    states: by stage, where they are known already; only those stages are looked at.
    """
    states = states or {stage: state_bytes(layout, stage) for stage in range(layout.parallel.pipeline)}
    return LayoutMemory(
        tuple(
            RankMemory(
                stage,
                states[stage],
                activation_bytes(layout, stage, microbatch, microbatches, GPU, EXPERT_LOAD),
                COMMUNICATOR_BYTES * communicators(layout),
                server,
                engine,
                gpu.memory * (1 - RESERVE),
            )
            for stage in states
        )
    )


def full_microbatch(layout: Layout, workload: Workload) -> MicrobatchSize:
    """A micro-batch at the token budget, or of one longest response where that is beyond it."""
    longest = workload.max_prompt_tokens + workload.max_response_tokens
    tokens = max(workload.max_tokens, longest)
    # Of a group of longest responses, the share that carries a loss.
    prompts = 1 if workload.share_prompt else workload.responses
    responses = workload.responses * workload.max_response_tokens
    rows = tokens * responses / (responses + prompts * workload.max_prompt_tokens)
    return MicrobatchSize(tokens=tokens, rows=math.ceil(rows))


def smallest_server(description: ModelDescription, tensor: int, workload: Workload) -> float:
    """Bytes on each of a server's `tensor` GPUs: its weights, and a KV cache for all responses of one longest prompt. A
    server takes more where there is more: it then works on more requests at once."""
    tokens = workload.max_prompt_tokens + workload.responses * workload.max_response_tokens
    return server_memory(description, tensor) + tokens * kv_bytes_per_token(description, tensor)


def communicators(layout: Layout) -> int:
    """Groups of more than one rank that a rank takes part in, the world's among them."""
    parallel = layout.parallel
    sizes = (
        layout.world,
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        layout.data * parallel.context,
        parallel.expert,
        layout.expert_data if layout.description.num_experts else 1,
    )
    return sum(size > 1 for size in sizes)


def built_states(layout: Layout) -> dict[int, StateBytes]:
    """What `state_bytes` computes, counted on the first rank of each pipeline stage, which is built on the meta device.
    The other ranks of a stage hold as much, or less by some padding; stages with the same parameters are built once."""
    sizes = LocalSizes.of(layout)
    ranks = layout.world // layout.parallel.pipeline
    built: dict[Hashable, StateBytes] = {}
    states = {}
    for stage in range(layout.parallel.pipeline):
        # Buckets of the first stage differ (planning/states.py).
        kind = stage == 0, tuple((tuple(dense), tuple(experts)) for dense, experts in sizes.chunks(layout, stage))
        if kind not in built:
            built[kind] = built_bytes(layout.description, layout.parallel, layout.model, layout.world, stage * ranks)
        states[stage] = built[kind]
    return states


def run_memory(
    config: RunConfig,
    layout: Layout,
    microbatch: MicrobatchSize,
    microbatches: int,
    gpu: Gpu,
    states: Mapping[int, StateBytes],
) -> LayoutMemory:
    """The memory of a configured run, of the stages of `states`; other arguments as of `layout_memory`."""
    generates = config.is_rl or bool(config.data.eval)
    server = engine = 0.0
    if generates and config.rollout.engine == "transformers":
        engine = weight_bytes(layout)
    elif generates and config.rollout.colocate:
        longest = workload_of(config, config.data.max_prompt_tokens, config.data.max_response_tokens)
        server = smallest_server(layout.description, config.rollout.tensor, longest)
    return layout_memory(layout, microbatch, microbatches, gpu, server, engine, states)

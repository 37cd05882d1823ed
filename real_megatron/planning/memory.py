"""What a rank's GPU holds in training and in rollout, beside what it has room for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from real_megatron.bridge import ModelDescription
from real_megatron.config import RunConfig
from real_megatron.hardware import Gpu
from real_megatron.planning.activations import GPU, ActivationBytes, MicrobatchSize, activation_bytes
from real_megatron.planning.servers import Servers, kv_bytes_per_token, server_memory
from real_megatron.planning.states import StateBytes, state_bytes
from real_megatron.planning.workload import Layout, Workload

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
    """A colocated server's weights, and the smallest KV cache that it can work with; see `smallest_server`."""
    colocated: bool
    room: float
    """Bytes that may be used: the GPU's, without `RESERVE`."""

    @property
    def training(self) -> float:
        """While a step trains."""
        asleep = ASLEEP_BYTES if self.colocated else 0
        return self.states.total + self.activations.total * (1 + FRAGMENTATION) + self.communication + asleep

    @property
    def rollout(self) -> float:
        """While a colocated server generates: the trainer keeps its weights, gradients and optimizer."""
        return self.states.total + self.communication + self.server if self.colocated else 0.0

    @property
    def peak(self) -> float:
        return max(self.training, self.rollout)

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def binds(self) -> str:
        """The largest part of the fuller phase."""
        if self.rollout > self.training:
            parts = {"colocated server": self.server}
        else:
            parts = {"activations": self.activations.layers, "output head": self.activations.head}
        parts |= {
            "weights": self.states.weights,
            "gradients": self.states.gradients,
            "optimizer": self.states.optimizer,
        }
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
    workload: Workload,
    gpu: Gpu,
    servers: Servers | None = None,
    longest: MicrobatchSize | None = None,
    states: Mapping[int, StateBytes] | None = None,
) -> LayoutMemory:
    """The memory of each pipeline stage.

    servers: where responses are generated; they take the trainers' memory if they are colocated. longest: the longest
    micro-batch; default: a full one, of the workload's longest responses. states: by stage, where they are known
    already; only those stages are looked at.
    """
    states = states or {stage: state_bytes(layout, stage) for stage in range(layout.parallel.pipeline)}
    size = longest or full_microbatch(layout, workload)
    count = microbatches(layout, workload)
    server = smallest_server(layout.description, servers, workload) if servers and servers.colocated else 0.0
    return LayoutMemory(
        tuple(
            RankMemory(
                stage,
                states[stage],
                activation_bytes(layout, stage, size, count, GPU, EXPERT_LOAD),
                COMMUNICATOR_BYTES * communicators(layout),
                server,
                bool(servers and servers.colocated),
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


def smallest_server(description: ModelDescription, servers: Servers, workload: Workload) -> float:
    """Bytes on each GPU of a server: its weights, and a KV cache for all responses of one longest prompt. A server
    takes more where there is more: it then works on more requests at once."""
    tokens = workload.max_prompt_tokens + workload.responses * workload.max_response_tokens
    return server_memory(description, servers.tensor) + tokens * kv_bytes_per_token(description, servers.tensor)


def microbatches(layout: Layout, workload: Workload) -> int:
    """Micro-batches of a data-parallel rank in one update."""
    tokens = workload.prompts * workload.group_tokens / workload.mini_batches / layout.data
    count = max(1, math.ceil(tokens / workload.max_tokens))
    # The interleaved schedule runs them in rounds of the pipeline size.
    return (
        -(-count // layout.parallel.pipeline) * layout.parallel.pipeline if layout.parallel.virtual_pipeline else count
    )


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


def servers_of(config: RunConfig, world: int) -> Servers | None:
    """The servers that a run's configuration names; None where it has none (embedded engine, supervised training)."""
    rollout = config.rollout
    if not config.is_rl or rollout.engine == "transformers":
        return None
    count = len(rollout.servers) or rollout.replicas
    return Servers(
        gpus=world if rollout.colocate else count * rollout.tensor,
        tensor=rollout.tensor,
        colocated=rollout.colocate,
        staleness=rollout.staleness,
        concurrency=rollout.concurrency,
        keep_weights=rollout.keep_weights,
    )

"""A few sensible layouts: stands in for planning.search until that is there."""

from collections.abc import Iterator
from dataclasses import dataclass

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.hardware import Gpu
from real_megatron.planning.servers import Servers, server_memory
from real_megatron.planning.shapes import shapes
from real_megatron.planning.step_time import StepTime, step_time
from real_megatron.planning.workload import Layout, Workload


@dataclass(frozen=True)
class Candidate:
    layout: Layout
    servers: Servers | None
    memory: float
    time: StepTime


def memory_of(layout: Layout, workload: Workload) -> float:
    w, p = shapes(layout.description), layout.parallel
    dense = (w.attention + w.mlp) / (p.tensor * p.pipeline) + w.vocabulary / p.tensor
    experts = w.experts / (p.tensor * p.pipeline * p.expert)
    state = dense * (6 + 12 / (layout.data * p.context)) + experts * (6 + 12 / layout.expert_data)
    per_layer = 2.0 * workload.max_tokens * layout.description.hidden_size / (p.context * p.tensor)
    full = layout.model.recompute == "full"
    act = per_layer * layout.description.num_layers * (1 if full else 20) + 60 * per_layer
    return state + act


def layouts(description: ModelDescription, world: int) -> Iterator[Layout]:
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            uneven = bool(description.num_layers % pipeline)
            if uneven and (description.num_layers + 2) % pipeline:
                continue
            for expert in (1, 4, 8, 16, 32) if description.num_experts else (1,):
                if tensor * pipeline > world or world % (tensor * pipeline * expert) or description.num_groups % tensor:
                    continue
                for recompute in ("none", "full"):
                    parallel = ParallelConfig(
                        tensor=tensor, pipeline=pipeline, expert=expert, sequence_parallel=tensor > 1,
                        account_for_embedding=uneven, account_for_loss=uneven,
                    )  # fmt: skip
                    yield Layout(description, parallel, ModelConfig.model_validate({"recompute": recompute}), world)


def best_layouts(description: ModelDescription, gpus: int, gpu: Gpu, workload: Workload) -> list[Candidate]:
    found = []
    for share in (0.25, 0.5, 0.75):
        world = int(gpus * share) // 8 * 8
        if not world or world == gpus:
            continue
        sizes = [t for t in (1, 2, 4, 8, 16) if server_memory(description, t) < 0.6 * gpu.memory and t <= gpus - world]
        if not sizes:
            continue
        servers = Servers(gpus - world, sizes[0])
        for layout in layouts(description, world):
            if memory_of(layout, workload) < 0.9 * gpu.memory:
                found.append(Candidate(layout, servers, 0.0, step_time(layout, workload, gpu, servers)))
    return sorted(found, key=lambda c: c.time.total)[:3]

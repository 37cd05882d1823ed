"""Host work of a step, a save and a resume, before and after it was taken off the size of the world (docs/scaling.md).

Bytes are counted. Seconds are those of one core, or of one adapter, by the rates below; what a GPU or its links do is
projected as in the rest of the page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.host.checkpoints import RESUMING, SAVING, counted
from benchmarks.report import table
from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import DEFAULT
from real_megatron.planning.links import group
from real_megatron.planning.servers import Servers
from real_megatron.planning.shapes import shapes
from real_megatron.planning.sync_time import sync_time
from real_megatron.planning.workload import Layout, Workload

_BUCKET_BYTES = 512 * 2**20


class Ways(NamedTuple):
    """The same of both ways."""

    before: float
    after: float


# Measured on one core, per response of 600 tokens: benchmarks/results/host_cpu.md.
CUT = Ways(3.8e-3, 0.85e-3)
DISTINCT = Ways(2.1e-3, 0.10e-3)
REPLY = Ways(1.9e-3, 0.69e-3)
TOKEN_BYTES = Ways(13.2, 9.05)
"""Of a sampled token and its log-prob: pickled lists; tensors."""
TOKENS = 600
"""Of those responses."""
TCP = 2.5e9
"""Bytes/s of gloo between two hosts: assumed, 20 Gbit/s of one connection."""
PAGEABLE = 6e9
"""Bytes/s from a GPU to fresh pageable host memory, where a sync kept the weights before."""


@dataclass(frozen=True)
class Part:
    """What one part costs: seconds that the step waits for it, and bytes that come to a node, or to the rank that its
    name says."""

    what: str
    seconds: Ways | None
    bytes: Ways


def host_parts(layout: Layout, workload: Workload, servers: Servers, gpu: Gpu) -> list[Part]:
    """The parts of a step with servers, then those of a save and a resume."""
    ranks = min(layout.world, gpu.per_node)
    responses = workload.prompts * workload.responses
    tokens = responses * workload.response_tokens
    scale = responses * workload.response_tokens / TOKENS
    arriving = Ways(
        ranks * (layout.world - 1) * tokens * TOKEN_BYTES.before,
        ranks * tokens * TOKEN_BYTES.after,
    )
    parts = [Part("responses to all ranks", Ways(*(one / TCP for one in arriving)), arriving)]
    for what, cost in (("reading replies", REPLY), ("finding scores", CUT), ("distinct n-grams", DISTINCT)):
        parts.append(Part(what, Ways(*(scale * one for one in cost)), Ways(0, 0)))
    parts += _sync(layout, servers, gpu, ranks)
    saved = {(row.part, row.variant): row.moved or 0.0 for row in counted(layout)}
    for what, part in (("a rank's save: state of others", SAVING), ("a rank's resume: files", RESUMING)):
        parts.append(Part(what, None, Ways(saved[part, "before"], saved[part, "after"])))
    return parts


def _sync(layout: Layout, servers: Servers, gpu: Gpu, ranks: int) -> list[Part]:
    """Of a sync: the gathering of shards, and the copy to host memory."""
    parallel, weights = layout.parallel, shapes(layout.description)
    size, experts = 2.0 * weights.total, 2.0 * weights.experts
    now = sync_time(layout, gpu, servers)
    # Before: in the table's order, where each layer's two kinds of expert weights change owner with each of its ranks.
    owners = parallel.pipeline + (2 * weights.moe_layers * parallel.expert if experts else 0)
    buckets = max(math.ceil(size / _BUCKET_BYTES), owners)
    gathering = (
        group(gpu, DEFAULT, 1, parallel.tensor).gather(size, buckets)
        + group(gpu, DEFAULT, parallel.tensor, parallel.expert).send(experts, owners)
        + group(gpu, DEFAULT, layout.world // parallel.pipeline, parallel.pipeline).send(size, buckets)
    )
    return [
        Part("a sync: gathering shards", Ways(gathering, now["gathering shards"]), Ways(ranks * size, size)),
        Part(
            "a sync: keeping weights, beyond sending",
            Ways(size / PAGEABLE, now["copy to host memory, beyond sending"]),
            Ways(0, 0),
        ),
    ]


def host_table(models: Sequence[tuple[str, list[Part]]]) -> list[str]:
    """A row a part; per model seconds and gigabytes, before and after; the sum of a step's seconds last."""
    rows = []
    for alike in zip(*(parts for _, parts in models), strict=True):
        row = [alike[0].what]
        for part in alike:
            row += ["–", "–"] if part.seconds is None else [f"{one:.2f}" for one in part.seconds]
            row += [f"{one / 1e9:,.2f}" for one in part.bytes] if max(part.bytes) else ["–", "–"]
        rows.append(row)
    total = ["a step"]
    for _, parts in models:
        timed = [part.seconds for part in parts if part.seconds is not None]
        total += [f"**{sum(one.before for one in timed):.1f}**", f"**{sum(one.after for one in timed):.1f}**", "–", "–"]
    index = next(i for i, part in enumerate(models[0][1]) if part.seconds is None)
    rows.insert(index, total)
    header = ["part"]
    for name, _ in models:
        header += [f"{name}: s, before", "after", "GB a node, before", "after"]
    return table(header, rows)

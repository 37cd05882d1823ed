"""Estimates as tables and as configuration."""

from typing import Any

import yaml
from rich.table import Table

from real_megatron.config import ParallelConfig
from real_megatron.hardware import Gpu
from real_megatron.planning.memory import GIB, RESERVE
from real_megatron.planning.search import Candidate, Found
from real_megatron.planning.servers import Servers
from real_megatron.planning.workload import Layout

_SHORT = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP"}


def candidates_table(found: Found, gpu: Gpu) -> Table:
    """The best layouts, fastest first: sizes, the fullest rank's memory, seconds of a step, and what binds."""
    table = Table(
        title=f"{found.fitting:,} of {found.tried:,} layouts fit in {gpu.memory / GIB:.0f} GiB of {gpu.name}, "
        f"{RESERVE:.0%} of them kept free",
        caption="Projected, not measured: docs/scaling.md sets such times beside published ones.",
    )
    for name in ("training", "recompute", "tokens a micro-batch", "servers"):
        table.add_column(name)
    for name in ("GiB", "s/step", "rollout", "update", "sync"):
        table.add_column(name, justify="right")
    table.add_column("binds")
    for one in found.best:
        time = one.time
        table.add_row(
            layout_text(one.layout),
            one.layout.model.recompute,
            f"{one.workload.max_tokens:,}",
            servers_text(one.servers),
            f"{one.memory.fullest.peak / GIB:.0f}",
            *(f"{seconds:.1f}" for seconds in (time.total, time.phase("rollout"), time.training, time.phase("sync"))),
            f"{time.binds}; memory: {one.memory.fullest.binds}",
        )
    return table


def layout_text(layout: Layout) -> str:
    """`TP4 PP2 EP16 DP8`; sizes of one are left out."""
    sizes = {short: getattr(layout.parallel, key) or 1 for key, short in _SHORT.items()} | {"DP": layout.data}
    return " ".join(f"{short}{size}" for short, size in sizes.items() if size > 1) or "1 GPU"


def servers_text(servers: Servers | None) -> str:
    """`4 of 8 GPUs, colocated`."""
    if servers is None:
        return "none"
    gpus = f"{servers.tensor} GPU{'s' if servers.tensor > 1 else ''}"
    return f"{servers.count} of {gpus}{', colocated' if servers.colocated else ''}"


def settings(candidate: Candidate, gpu: Gpu) -> str:
    """The candidate as YAML of a run's configuration: what differs from the defaults."""
    layout, servers = candidate.layout, candidate.servers
    defaults = ParallelConfig()
    chosen = layout.parallel.model_dump(exclude_defaults=True)
    tree: dict[str, Any] = {"parallel": chosen or {"tensor": defaults.tensor}}
    tree["model"] = {"recompute": layout.model.recompute}
    tree["batch"] = {"max_tokens": candidate.workload.max_tokens}
    if servers is not None:
        tree["rollout"] = {"tensor": servers.tensor}
        if servers.colocated:
            tree["rollout"] |= {"colocate": True, "replicas": servers.count}
        elif candidate.gpus <= gpu.per_node:
            tree["rollout"] |= {"replicas": servers.count, "first_gpu": layout.world}
    return yaml.safe_dump(tree, sort_keys=False)

"""Estimates as tables and as configuration."""

from typing import Any

import yaml
from rich import box
from rich.table import Table

from real_megatron.config import RunConfig
from real_megatron.hardware import Gpu
from real_megatron.planning.memory import GIB, RESERVE
from real_megatron.planning.search import SAME_TIME, Candidate, Found
from real_megatron.planning.servers import Servers
from real_megatron.planning.workload import Layout

_SHORT = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP"}


def candidates_table(found: Found, gpu: Gpu) -> Table:
    """The best layouts as they are ranked: ranks and sizes, the fullest rank's memory, seconds of a step, and what
    binds. Words stay whole from 100 columns on."""
    caption = (
        "Projected, not measured: docs/scaling.md sets such times beside published ones. Seconds of a step and of its "
        f"phases; steps within {SAME_TIME:.0%} count as equal, and the simpler layout comes first. GiB: of the fullest "
        "training GPU."
    )
    if any(one.time.overlapped for one in found.best):
        caption += " The rollout runs beside the update (rollout.staleness 1)."
    table = Table(
        title=f"{found.fitting:,} of {found.tried:,} layouts fit in {gpu.memory / GIB:.0f} GiB of {gpu.name}, "
        f"{RESERVE:.0%} of them kept free",
        caption=caption,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name, width in (("training ranks", 8), ("recompute", 9), ("max tokens", 7), ("servers", 9)):
        table.add_column(name, min_width=width)
    for name in ("GiB", "s/step", "rollout", "update", "sync", "host"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("binds", min_width=11)
    for one in found.best:
        time = one.time
        phases = (time.phase("rollout"), time.training, time.phase("sync"), time.phase("host"))
        table.add_row(
            f"{one.layout.world}: {layout_text(one.layout)}",
            one.layout.model.recompute,
            f"{one.workload.max_tokens:,}",
            servers_text(one.servers),
            f"{one.memory.fullest.peak / GIB:.0f}",
            *(f"{seconds:.1f}" for seconds in (time.total, *phases)),
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


def settings(candidate: Candidate, gpu: Gpu, config: RunConfig | None = None) -> str:
    """The candidate as YAML to lay over a run's configuration: what differs from the defaults, or from what `config`
    says. Comments name the ranks, and the servers that the run does not start."""
    layout, servers = candidate.layout, candidate.servers
    config = config or RunConfig()
    chosen: dict[str, dict[str, Any]] = {
        "parallel": layout.parallel.model_dump(),
        "model": {"recompute": layout.model.recompute},
        "batch": {"max_tokens": candidate.workload.max_tokens},
    }
    about = f"# {layout.world} training rank{'s' if layout.world > 1 else ''}: --world {layout.world} in a dry run\n"
    if servers is not None:
        # The engine in the trainer would put a further copy of the model on each rank.
        engine = "sglang" if config.rollout.engine == "transformers" else config.rollout.engine
        chosen["rollout"] = {"engine": engine, "tensor": servers.tensor, "colocate": servers.colocated}
        if servers.colocated or candidate.gpus <= gpu.per_node:
            first = 0 if servers.colocated else layout.world
            chosen["rollout"] |= {"replicas": servers.count, "first_gpu": first, "servers": []}
        else:
            about += f"# servers: {servers_text(servers)} on further nodes, to be named in rollout.servers\n"
    written = {"parallel": {"tensor"}, "model": {"recompute"}, "batch": {"max_tokens"}, "rollout": {"tensor", "engine"}}
    defaults, given = RunConfig().model_dump(), config.model_dump()
    tree = {
        section: {
            key: value
            for key, value in values.items()
            if key in written[section] or value != defaults[section][key] or value != given[section][key]
        }
        for section, values in chosen.items()
    }
    return about + yaml.safe_dump(tree, sort_keys=False)

"""Whether all ranks were started for the same job: hosts may hold copies of its files, and one of them an older one."""

import socket
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.runtime import from_rank_0
from real_megatron.sections import flatten

OF_A_HOST = ("rollout.sync_host",)
"""Keys that a launcher sets differently on each host."""
_SHOWN = 8


def check_ranks_agree(config: RunConfig, inputs: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError, on every rank alike, where ranks have another configuration or other inputs than rank 0: they
    would train or judge together without a word, each by its own. Collective.

    inputs: digests of what this rank reads, by a name for messages
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = flatten(config.model_dump(mode="json")) | dict(inputs or {})
    first = from_rank_0(lambda: mine)
    lines = [
        f"  {key}: {_told(mine, key)} there, {_told(first, key)} on rank 0"
        for key in sorted(mine.keys() | first.keys())
        if key not in OF_A_HOST and (key not in mine or key not in first or mine[key] != first[key])
    ]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), lines))
    others = [(rank, host, lines) for rank, (host, lines) in enumerate(found) if lines]
    if others:
        rank, host, lines = others[0]
        ranks = ", ".join(str(number) for number, _, _ in others[:_SHOWN]) + (", …" if len(others) > _SHOWN else "")
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise ConfigError(
            f"rank {rank} on {host} was started with something else than rank 0:\n"
            + "\n".join(lines[:_SHOWN] + more)
            + f"\nThe ranks that differ: {ranks}. Start all of them with the same configuration, data and model: copy "
            "the files to every host, or put them on a file system that all share."
        )


def _told(facts: Mapping[str, Any], key: str) -> str:
    return repr(facts[key])[:200] if key in facts else "nothing"

"""What a launch knows of its rollout hosts: ports, how many servers, whether a router. Each host asks for it before
anything else starts, so nothing slow is imported: torch and transformers take seconds, on each of many hosts."""

import sys

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError
from real_megatron.rollout.sglang.router import PACKAGE, router_installed

SERVER_PORT = 30000
"""Of the first server of a node."""
ROUTER_PORT = 29990
"""Of the router of all nodes, and of its metrics the port behind it."""
KEY_VARIABLE = "REAL_SERVER_KEY"
"""Environment variable with the servers' API key."""
_SERVED = ("sglang", "vllm")
"""Engines of this package that have servers."""


def servers_of(config: RunConfig, gpus: int) -> int:
    """How many servers a node of so many GPUs has. Raises ConfigError for none, and for an engine without servers."""
    rollout = config.rollout
    if not _has_servers(rollout.engine):
        raise ConfigError(
            f"rollout.engine is {rollout.engine}, which has no servers: set it to sglang or vllm, or give no host "
            "role=rollout"
        )
    if rollout.colocate:
        raise ConfigError(
            "rollout.colocate: servers that share the trainer's GPUs start on its node: switch it off, or give no host "
            "role=rollout"
        )
    if gpus < rollout.tensor:
        raise ConfigError(f"rollout.tensor is {rollout.tensor}, more than the {gpus} GPUs of a rollout host: lower it")
    return gpus // rollout.tensor


def _has_servers(engine: str) -> bool:
    if engine in _SERVED:
        return True
    from real_megatron.rollout.factory import find_engine

    return find_engine(engine).server_command is not None


def check_router(config: RunConfig) -> None:
    """Raise ConfigError where sglang-router cannot stand in front of the servers of this configuration."""
    rollout = config.rollout
    if rollout.engine != "sglang":
        raise ConfigError(
            f"router=on is for rollout.engine=sglang, and it is {rollout.engine}: remove it from the host file"
        )
    if rollout.router is not None:
        raise ConfigError(
            f"router=on starts a router, and rollout.router names another ({rollout.router}): remove one of them"
        )
    if not router_installed(rollout):
        python = rollout.python or sys.executable
        raise ConfigError(
            f"router=on, but {python} cannot import {PACKAGE}: install sglang-router there (requirements/sglang.txt), "
            "or remove it from the host file"
        )

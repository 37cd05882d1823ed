"""The servers of an engine: those that the configuration names, or local ones to start."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from real_megatron.config import RolloutConfig
from real_megatron.errors import ConfigError
from real_megatron.rollout.engine import ServerCommand
from real_megatron.rollout.remote.ports import LOCAL, free_ports, in_use
from real_megatron.rollout.remote.process import ServerProcess
from real_megatron.rollout.remote.replica import Replica


def api_key(config: RolloutConfig) -> str | None:
    """The API key of local servers: a random one, new at each call. Of attached ones: what the environment variable
    `rollout.api_key_variable` holds, or None. Raises ConfigError when it is not set."""
    if not config.servers:
        return secrets.token_hex(32)
    name = config.api_key_variable
    if name and not os.environ.get(name, "").strip():
        raise ConfigError(
            f"rollout.api_key_variable: the environment variable {name} is not set: export the API key of "
            "rollout.servers in it, or leave the key empty where they have none"
        )
    return os.environ[name].strip() if name else None


def weight_sync(config: RolloutConfig, broadcasts: bool) -> str:
    """How weights reach the servers: `rollout.weight_sync`, where `auto` is decided.

    broadcasts: whether the engine's servers can take a broadcast (`EngineKind.broadcasts`); others read files
    """
    if config.weight_sync != "auto":
        return config.weight_sync
    if not broadcasts:
        return "disk"
    return "tensor" if config.colocate else "distributed"


def port_taken(config: RolloutConfig, port: int) -> str:
    """Why no local server can listen on `port`; empty if one can."""
    if not in_use(port):
        return ""
    return (
        f"rollout.port: port {port} of {LOCAL} is in use by another process: end that, or set rollout.port to the "
        f"first of {config.replicas} free ports (0: they are chosen)"
    )


def check_ports(config: RolloutConfig) -> None:
    """Raise ConfigError where a port of the local servers, as `rollout.port` chooses them, is in use."""
    for port in range(config.port, config.port + config.replicas) if config.port else ():
        if reason := port_taken(config, port):
            raise ConfigError(reason)


def configured_servers(
    config: RolloutConfig, name: str, log_dir: Path, key: str | None, command: Callable[[int, int], ServerCommand]
) -> list[Replica]:
    """The servers to attach to (`rollout.servers`), or processes to start, not started yet.

    name: of the log files: `log_dir/<name>-<index>.<start>.log`. key: as of `api_key`. command: (index, port) -> how
    that local server is started.
    """
    if config.servers:
        return [Replica(url) for url in config.servers]
    replicas = []
    ports = range(config.port, config.port + config.replicas) if config.port else free_ports(config.replicas)
    for index, port in enumerate(ports):
        server = command(index, port)
        assert key is not None  # local servers always have one
        environment = server.environment | {server.key_variable: key}
        process = ServerProcess(server.arguments, log_dir, f"{name}-{index}", environment)
        replicas.append(Replica(f"http://{LOCAL}:{port}", process))
    return replicas

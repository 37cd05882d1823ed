"""The servers of an engine: those that the configuration names, or local ones to start."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from real_megatron.config import RolloutConfig
from real_megatron.rollout.remote.process import ServerProcess, free_port
from real_megatron.rollout.remote.replica import Replica


@dataclass(frozen=True)
class ServerCommand:
    """How one local server is started."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set in addition to those of this process."""


def configured_servers(
    config: RolloutConfig, name: str, log_dir: Path, command: Callable[[int, int], ServerCommand]
) -> list[Replica]:
    """The servers to attach to (`rollout.servers`), or processes to start, not started yet.

    name: of the log files: `log_dir/<name>-<index>.<start>.log`. command: (index, port) -> how that local server is
    started.
    """
    if config.servers:
        return [Replica(url) for url in config.servers]
    replicas = []
    for index in range(config.replicas):
        port = config.port + index if config.port else free_port()
        server = command(index, port)
        process = ServerProcess(server.arguments, log_dir, f"{name}-{index}", server.environment)
        replicas.append(Replica(f"http://127.0.0.1:{port}", process))
    return replicas

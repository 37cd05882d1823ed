"""The engine that a configuration asks for."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from real_megatron.config import RolloutConfig
from real_megatron.errors import ConfigError, EngineError
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.engine import ENGINES, EngineKind, EngineSpec, RolloutEngine
from real_megatron.rollout.nccl import check_nccl
from real_megatron.rollout.remote.process import tmpdir_too_long
from real_megatron.rollout.remote.servers import api_key, check_ports, weight_sync

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def find_engine(name: str) -> EngineKind:
    """The engine of `rollout.engine`. Raises ConfigError for an unknown one, or one that is not registered."""
    kind = ENGINES.find(name)
    if not isinstance(kind, EngineKind):
        raise ConfigError(f"rollout.engine: {name!r} is not registered as an engine: decorate it with register_engine")
    return kind


@dataclass(frozen=True)
class Node:
    """The node of rank 0, on which local servers start: the "this node" of messages."""

    gpus: int
    trainers: int
    """Training ranks there; rank i uses GPU i."""


def check_servers(config: RolloutConfig, *, trainer: bool, node: Node | None = None) -> None:
    """Raise ConfigError for an engine that is unknown or servers that could not work here, before a model is loaded for
    nothing.

    trainer: whether this process trains, so that it needs its GPU and sends weights. node: one to judge by instead of
    this one, which may have no GPU; NCCL, which both ends have, is not compared then.
    """
    kind = find_engine(config.engine)
    if not kind.server_package:
        if config.servers and config.engine == "transformers":
            raise ConfigError(
                "rollout.servers are for the engines sglang and vllm, and rollout.engine is transformers: set it to "
                "one of them, or remove the servers"
            )
        return
    broadcasts = trainer and kind.broadcasts and weight_sync(config, kind.broadcasts) == "distributed"
    # One rank holds the engine. On the nodes of others a port or a variable means nothing.
    asks = os.environ.get("RANK", "0") == "0"
    if config.servers:
        if asks:
            api_key(config)
        remote = [url for url in config.servers if urlsplit(url).hostname not in _LOOPBACK]
        if broadcasts and remote and config.sync_host in _LOOPBACK:
            raise ConfigError(
                f"rollout.sync_host is {config.sync_host}, by which the server {remote[0]} does not reach this host: "
                "set it to the address of the node of rank 0"
            )
        return
    python = config.python or sys.executable
    if shutil.which(python) is None:
        raise ConfigError(f"rollout.python: {python} is not there, or cannot be executed")
    if not config.python and importlib.util.find_spec(kind.server_package) is None:
        raise ConfigError(
            f"rollout.engine is {config.engine}, but {kind.server_package} is not installed beside the trainer: name "
            "the Python of the environment that has it in rollout.python, or attach to running servers with "
            "rollout.servers"
        )
    if asks:
        check_ports(config)
        if broadcasts and config.python and node is None and torch.cuda.is_available():
            check_nccl(config.python)
    if reason := tmpdir_too_long():
        raise ConfigError(reason)
    if node is None and torch.cuda.is_available():
        node = Node(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if trainer else 0)
    if node is not None:
        _check_gpus(config, node)


def _check_gpus(config: RolloutConfig, node: Node) -> None:
    end = config.first_gpu + config.replicas * config.tensor
    wanted = f"rollout.replicas × rollout.tensor = {config.replicas * config.tensor} GPUs from rollout.first_gpu = "
    wanted += f"{config.first_gpu} on"
    if end > node.gpus:
        raise ConfigError(f"{wanted} do not fit into the {node.gpus} GPUs of this node")
    if config.first_gpu < node.trainers and not config.colocate:
        raise ConfigError(
            f"{wanted} are also those of the {node.trainers} training ranks of this node: start fewer ranks and set "
            "rollout.first_gpu to their number, attach to servers elsewhere with rollout.servers, or set "
            "rollout.colocate"
        )


def build_engine(spec: EngineSpec, group: dist.ProcessGroup | None = None) -> RolloutEngine:
    """The engine of `spec.config.engine`, for all ranks of `group` when torch.distributed is initialised. Collective.

    group: see DistributedRollout; None: all ranks. Raises ConfigError for settings that the engine does not take,
    EngineError for servers that cannot be used. Where rank 0 alone builds an engine, it raises its own error and the
    other ranks an EngineError.
    """
    kind = find_engine(spec.config.engine)
    alone = not dist.is_initialized() or dist.get_world_size(group) == 1
    if alone:
        return kind.build(spec)
    if kind.on_every_rank:
        return DistributedRollout(kind.build(spec), group)
    failure: Exception | None = None
    engine: RolloutEngine = FollowerEngine()
    if dist.get_rank(group) == 0:
        try:
            engine = kind.build(spec)
        except Exception as error:
            failure = error
    message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(message, group_src=0, group=group)
    if failure is not None:
        raise failure
    if message[0]:
        raise EngineError(f"the rollout engine could not be built on rank 0: {message[0]}")
    return DistributedRollout(engine, group)

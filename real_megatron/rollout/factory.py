"""The engine that a configuration asks for."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedTokenizerBase

from real_megatron.config import RolloutConfig
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.engine import RolloutEngine
from real_megatron.rollout.remote.errors import RolloutError
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.transformers_engine import TransformersEngine
from real_megatron.rollout.vllm.engine import VLLMEngine
from real_megatron.sections import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_servers(config: RolloutConfig, *, trainer: bool) -> None:
    """Raise ConfigError for servers that could not work here, before a model is loaded for nothing.

    trainer: whether this process trains, so that it needs its GPU and sends weights
    """
    if config.engine == "transformers":
        return
    if config.servers:
        sends = trainer and config.engine == "sglang" and config.weight_sync in ("auto", "distributed")
        remote = [url for url in config.servers if urlsplit(url).hostname not in _LOOPBACK]
        if sends and not config.colocate and remote and config.sync_host in _LOOPBACK:
            raise ConfigError(
                f"rollout.sync_host is {config.sync_host}, by which the server {remote[0]} does not reach this host: "
                "set it to the address of the node of rank 0"
            )
        return
    python = config.python or sys.executable
    if shutil.which(python) is None:
        raise ConfigError(f"rollout.python: {python} is not there, or cannot be executed")
    if not config.python and importlib.util.find_spec(config.engine) is None:
        raise ConfigError(
            f"rollout.engine is {config.engine}, which is not installed beside the trainer: name the Python of the "
            "environment that has it in rollout.python, or attach to running servers with rollout.servers"
        )
    if torch.cuda.is_available():
        _check_gpus(config, torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if trainer else 0)


def _check_gpus(config: RolloutConfig, gpus: int, trainers: int) -> None:
    """trainers: ranks on this node; rank i uses GPU i"""
    end = config.first_gpu + config.replicas * config.tensor
    wanted = f"rollout.replicas × rollout.tensor = {config.replicas * config.tensor} GPUs from rollout.first_gpu = "
    wanted += f"{config.first_gpu} on"
    if end > gpus:
        raise ConfigError(f"{wanted} do not fit into the {gpus} GPUs of this node")
    if config.first_gpu < trainers and not config.colocate:
        raise ConfigError(
            f"{wanted} are also those of the {trainers} training ranks of this node: start fewer ranks and set "
            "rollout.first_gpu to their number, attach to servers elsewhere with rollout.servers, or set "
            "rollout.colocate"
        )


def build_engine(
    config: RolloutConfig,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    work_dir: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    serve_loaded: bool = False,
    group: dist.ProcessGroup | None = None,
) -> RolloutEngine:
    """The engine of `config.engine`, for all ranks of `group` when torch.distributed is initialised. Collective.

    model_dir: Hugging Face checkpoint: the architecture, and the weights when `serve_loaded`
    work_dir: logs of servers, and weights of a sync by disk
    serve_loaded: serve the checkpoint as it is, as version 0 (judge, evaluate); else `update_weights` comes first
    group: see DistributedRollout; None: the whole world
    """
    alone = not dist.is_initialized() or dist.get_world_size(group) == 1
    if alone:
        return _engine(config, model_dir, tokenizer, work_dir, torch.device(device), dtype, serve_loaded)
    if config.engine == "transformers":
        engine = _engine(config, model_dir, tokenizer, work_dir, torch.device(device), dtype, serve_loaded)
        return DistributedRollout(engine, group)
    first = dist.get_rank(group) == 0
    error: list[str | None] = [None]
    engine = FollowerEngine()
    if first:
        try:
            engine = _engine(config, model_dir, tokenizer, work_dir, torch.device(device), dtype, serve_loaded)
        except Exception as failure:
            error = [f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(error, group_src=0, group=group)
    if error[0]:
        raise RolloutError(f"the rollout engine could not be built on rank 0: {error[0]}")
    return DistributedRollout(engine, group)


def _engine(
    config: RolloutConfig,
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    work_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    serve_loaded: bool,
) -> RolloutEngine:
    if config.engine == "transformers":
        options = {"device": device, "dtype": dtype, "batch_size": config.batch_size}
        if serve_loaded:
            return TransformersEngine.from_pretrained(model_dir, tokenizer, **options)
        return TransformersEngine(AutoConfig.from_pretrained(model_dir), tokenizer, **options)
    remote = {"sglang": SGLangEngine, "vllm": VLLMEngine}[config.engine]
    hf_config = AutoConfig.from_pretrained(model_dir)
    return remote(config, hf_config, Path(model_dir), work_dir, device=device, dtype=dtype, serve_loaded=serve_loaded)

"""The engine that a configuration asks for."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, PreTrainedTokenizerBase

from real_megatron.config import RolloutConfig
from real_megatron.rollout.distributed import DistributedRollout, FollowerEngine
from real_megatron.rollout.engine import RolloutEngine
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.transformers_engine import TransformersEngine
from real_megatron.rollout.vllm.engine import VLLMEngine


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
        raise RuntimeError(f"the rollout engine could not be built on rank 0: {error[0]}")
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
    return remote(
        config, hf_config, Path(model_dir), work_dir, device=device.type, dtype=dtype, serve_loaded=serve_loaded
    )

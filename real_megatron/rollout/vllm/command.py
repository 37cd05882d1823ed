"""Command lines of local vLLM servers."""

import os
import sys

from real_megatron.rollout.engine import EngineSpec
from real_megatron.rollout.remote.process import LAUNCHER
from real_megatron.rollout.remote.servers import ServerCommand

SERVED_NAME = "policy"
"""The model's name in requests."""

RESERVED_TOKENS = 1
"""A scoring request generates a token, which is not read, behind the longest sequence."""

# Where a directory holds consolidated*.safetensors too, "auto" takes Mistral's format, whose config, weights and
# tokenizer are not the files that this package reads, and whose weights have other names.
_HF_FORMAT = ("--config-format", "hf", "--load-format", "safetensors", "--tokenizer-mode", "hf")


def server_command(spec: EngineSpec, index: int, port: int, context: int) -> ServerCommand:
    """Local server number `index`; `rollout.server_args` come last and win.

    context: longest prompt and response together, in tokens
    """
    config = spec.config
    arguments = [config.python or sys.executable, str(LAUNCHER), "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(spec.model_dir), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1"]
    arguments += ["--middleware", "vllm_guard.RequireKey"]  # beside the launcher: vLLM's own check leaves routes open
    arguments += ["--port", str(port), "--dtype", str(spec.dtype).removeprefix("torch.")]
    arguments += ["--max-model-len", str(context + RESERVED_TOKENS), "--tensor-parallel-size", str(config.tensor)]
    arguments += _HF_FORMAT
    if config.colocate:
        arguments += ["--enable-sleep-mode"]
    first = config.first_gpu + index * config.tensor
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # rollout.first_gpu counts what this process sees
    names = visible.split(",") if visible else [str(gpu) for gpu in range(first + config.tensor)]
    gpus = ",".join(names[first : first + config.tensor])
    environment = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": gpus}
    return ServerCommand(arguments + config.server_args, "VLLM_API_KEY", environment)

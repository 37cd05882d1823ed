"""Command lines of local vLLM servers."""

import os
import sys

from real_megatron.errors import EngineError
from real_megatron.rollout.engine import EngineSpec, ServerCommand
from real_megatron.rollout.remote.process import LAUNCHER

SERVED_NAME = "policy"
"""The model's name in requests."""

RESERVED_TOKENS = 1
"""A scoring request generates a token, which is not read, behind the longest sequence."""

_FP32_LOGITS = ("--hf-overrides", '{"head_dtype": "float32"}')
"""A user's own `--hf-overrides` replaces it."""

KEY_VARIABLE = "VLLM_API_KEY"

# Where a directory holds consolidated*.safetensors too, "auto" takes Mistral's format, whose config, weights and
# tokenizer are not the files that this package reads, and whose weights have other names.
_HF_FORMAT = ("--config-format", "hf", "--load-format", "safetensors", "--tokenizer-mode", "hf")

# vLLM 0.32's attention on a CPU has kernels for these. With another size a server starts, answers its health check, and
# ends at the first request.
_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

_MOST_CACHE_BYTES = 4 * 2**30

LIVE_HEAD = "vllm_cpu_head.LiveHead"
"""Beside the launcher: what a tied output layer needs on a CPU."""


def server_command(spec: EngineSpec, index: int, port: int, context: int) -> ServerCommand:
    """Local server number `index`; `rollout.server_args` come last and win.

    context: longest prompt and response together, in tokens
    """
    config = spec.config
    arguments = [config.python or sys.executable, str(LAUNCHER), "vllm.entrypoints.openai.api_server"]
    arguments += ["--model", str(spec.model_dir), "--served-model-name", SERVED_NAME, "--host", "127.0.0.1"]
    if spec.fp32_logits and spec.dtype.itemsize < 4:
        arguments += _FP32_LOGITS
    arguments += ["--middleware", "vllm_guard.RequireKey"]  # beside the launcher: vLLM's own check leaves routes open
    arguments += ["--port", str(port), "--dtype", str(spec.dtype).removeprefix("torch.")]
    arguments += ["--max-model-len", str(context + RESERVED_TOKENS), *_HF_FORMAT]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    if spec.device.type == "cpu":
        arguments += _cpu_arguments(spec, context)
        # Its own choice binds the worker of every server to the same core.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        return ServerCommand(arguments + config.server_args, KEY_VARIABLE, environment)
    arguments += ["--tensor-parallel-size", str(config.tensor)]
    if config.colocate:
        arguments += ["--enable-sleep-mode"]
    first = config.first_gpu + index * config.tensor
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # rollout.first_gpu counts what this process sees
    names = visible.split(",") if visible else [str(gpu) for gpu in range(first + config.tensor)]
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + config.tensor])
    return ServerCommand(arguments + config.server_args, KEY_VARIABLE, environment)


def _cpu_arguments(spec: EngineSpec, context: int) -> list[str]:
    """Raises EngineError for a model that vLLM cannot serve on a CPU."""
    model = spec.hf_config()
    heads = model.num_attention_heads
    head_size = getattr(model, "head_dim", None) or model.hidden_size // heads
    if head_size not in _CPU_HEAD_SIZES:
        raise EngineError(
            f"{spec.model_dir}/config.json: head_dim {head_size}: vLLM has no attention for it on a CPU (it takes "
            f"{', '.join(map(str, _CPU_HEAD_SIZES))}): set rollout.engine to transformers or sglang"
        )
    # Without a size vLLM takes 0.92 of the machine's memory. Room for every sample of the requests in flight at half
    # its longest length, if that is not too much; more would wait.
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    a_token = 2 * model.num_hidden_layers * kv_heads * head_size * spec.dtype.itemsize
    wanted = spec.config.concurrency * spec.config.n * context // 2 * a_token
    size = max(8192 * a_token, context * a_token, min(wanted, _MOST_CACHE_BYTES))
    arguments = ["--enforce-eager", "--kv-cache-memory-bytes", str(size)]
    if model.tie_word_embeddings:
        arguments += ["--worker-extension-cls", LIVE_HEAD]
    return arguments

"""Command lines of local SGLang servers."""

import sys

from real_megatron.rollout.engine import EngineSpec, ServerCommand
from real_megatron.rollout.remote.process import LAUNCHER, LAUNCHER_KEY
from real_megatron.rollout.sglang.replies import RESERVED_TOKENS

# SGLang 0.5.21 without a GPU: the torch-native path, no kernels of its own.
_CPU_ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--disable-overlap-schedule --disable-cuda-graph --sleep-on-idle"
).split()


def server_command(spec: EngineSpec, index: int, port: int, context: int) -> ServerCommand:
    """Local server number `index`; `rollout.server_args` come last and win.

    context: longest prompt and response together, in tokens
    """
    config = spec.config
    arguments = [config.python or sys.executable, str(LAUNCHER), "sglang.launch_server"]
    arguments += ["--model-path", str(spec.model_dir), "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", str(spec.dtype).removeprefix("torch."), "--context-length", str(context + RESERVED_TOKENS)]
    arguments += ["--skip-server-warmup"]
    if spec.fp32_logits and spec.dtype.itemsize < 4:
        arguments += ["--enable-fp32-lm-head"]
    if spec.device.type == "cpu":
        # Room for every sample of the prompts in flight at half their longest length; more would wait in the queue.
        tokens = max(8192, config.concurrency * config.n * context // 2)
        arguments += [*_CPU_ARGUMENTS, "--tp", "1", "--max-total-tokens", str(tokens)]
    else:
        first = config.first_gpu + index * config.tensor
        arguments += ["--tp", str(config.tensor), "--base-gpu-id", str(first)]
        if config.colocate:
            arguments += ["--enable-memory-saver"]
    # A trainer's pipeline stages differ in size, so the GPUs that a server shares with them may differ in free memory.
    environment = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"} if config.colocate else {}
    # SGLang takes its API key from its arguments alone: the launcher adds it to those inside its process. As no
    # --admin-api-key is set, it guards every route but /health*, /ready* and /metrics* (sglang/srt/utils/auth.py).
    return ServerCommand(arguments + config.server_args, LAUNCHER_KEY, environment)

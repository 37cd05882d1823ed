"""Command lines of local SGLang servers, and the replicas that a configuration asks for."""

import sys
from pathlib import Path

import torch

from real_megatron.config import RolloutConfig
from real_megatron.rollout.remote.process import LAUNCHER, ServerProcess, free_port
from real_megatron.rollout.remote.replica import Replica
from real_megatron.rollout.sglang.replies import RESERVED_TOKENS

# SGLang 0.5.21 without a GPU: the torch-native path, no kernels of its own.
_CPU_ARGUMENTS = (
    "--device cpu --attention-backend torch_native --sampling-backend pytorch --grammar-backend none "
    "--disable-overlap-schedule --disable-cuda-graph --sleep-on-idle"
).split()


def local_servers(
    config: RolloutConfig, model_dir: Path, log_dir: Path, device: str, dtype: torch.dtype, context: int
) -> list[Replica]:
    """The servers to attach to (`rollout.servers`), or processes to start, not started yet.

    context: longest prompt and response together, in tokens
    """
    if config.servers:
        return [Replica(url) for url in config.servers]
    replicas = []
    for index in range(config.replicas):
        port = config.port + index if config.port else free_port()
        command = server_command(config, model_dir, index, port, device, dtype, context)
        # Beside a trainer whose pipeline stages differ in size, a server's GPUs may differ in free memory.
        environment = {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"} if config.colocate else {}
        server = ServerProcess(command, log_dir, f"sglang-{index}", environment)
        replicas.append(Replica(f"http://127.0.0.1:{port}", server))
    return replicas


def server_command(
    config: RolloutConfig, model_dir: Path, index: int, port: int, device: str, dtype: torch.dtype, context: int
) -> list[str]:
    """Arguments of server number `index`; `rollout.server_args` come last and win."""
    command = [config.python or sys.executable, str(LAUNCHER), "sglang.launch_server"]
    command += ["--model-path", str(model_dir), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", str(dtype).removeprefix("torch."), "--context-length", str(context + RESERVED_TOKENS)]
    command += ["--skip-server-warmup"]
    if device == "cpu":
        # Room for every sample of the prompts in flight at half their longest length; more would wait in the queue.
        tokens = max(8192, config.concurrency * config.n * context // 2)
        command += [*_CPU_ARGUMENTS, "--tp", "1", "--max-total-tokens", str(tokens)]
    else:
        first = config.first_gpu + index * config.tensor
        command += ["--tp", str(config.tensor), "--base-gpu-id", str(first)]
        if config.colocate:
            command += ["--enable-memory-saver"]
    return command + config.server_args

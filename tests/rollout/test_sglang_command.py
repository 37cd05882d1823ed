"""Local servers: their command lines, ports and GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import EngineSpec
from real_megatron.rollout.remote.servers import api_key, configured_servers
from real_megatron.rollout.sglang.command import server_command
from real_megatron.rollout.vllm import command as vllm
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec


def spec(config: RolloutConfig, device: str = "cpu", dtype: torch.dtype = torch.float32, **fields: Any) -> EngineSpec:
    return engine_spec(config, Path("/m"), Path("/w"), device=torch.device(device), dtype=dtype, **fields)


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_a_gpu_server_takes_its_own_gpus_and_the_users_arguments_win():
    config = RolloutConfig(tensor=2, first_gpu=4, python="/venv/python", server_args=["--dtype", "half"], colocate=True)
    server = server_command(spec(config, "cuda", torch.bfloat16), 3, 5000, 3072)
    command = server.arguments
    assert command[0] == "/venv/python" and command[2] == "sglang.launch_server"
    assert value(command, "--base-gpu-id") == "10" and value(command, "--tp") == "2"
    assert value(command, "--host") == "127.0.0.1" and value(command, "--port") == "5000"
    assert value(command, "--dtype") == "bfloat16" and command[-2:] == ["--dtype", "half"]
    assert value(command, "--context-length") == "3074"
    assert "--enable-memory-saver" in command and "cpu" not in command
    assert value(command, "--model-path") == "/m"
    assert server.environment == {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"}


def test_a_cpu_server_uses_the_torch_native_path():
    server = server_command(spec(RolloutConfig()), 0, 5000, 128)
    command = server.arguments
    assert value(command, "--device") == "cpu" and value(command, "--attention-backend") == "torch_native"
    assert int(value(command, "--max-total-tokens")) >= 8192 and not server.environment


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (server_command, ["--enable-fp32-lm-head"]),
        (vllm.server_command, ["--hf-overrides", '{"head_dtype": "float32"}']),
    ],
    ids=["sglang", "vllm"],
)
def test_servers_of_16_bit_weights_keep_float32_logits(command, arguments):
    def found(dtype: torch.dtype, **fields: Any) -> bool:
        given = command(spec(RolloutConfig(), "cuda", dtype, **fields), 0, 5000, 128).arguments
        return all(argument in given for argument in arguments)

    assert found(torch.bfloat16) and found(torch.float16)
    assert not found(torch.float32) and not found(torch.bfloat16, fp32_logits=False)


def servers(config: RolloutConfig, log_dir: Path, command=server_command, device: str = "cpu"):
    return configured_servers(
        config, "server", log_dir, api_key(config), lambda index, port: command(spec(config, device), index, port, 128)
    )


def test_every_local_server_has_a_port_of_its_own(tmp_path):
    replicas = servers(RolloutConfig(replicas=3), tmp_path)
    commands = [r.process.command for r in replicas]
    assert [f"http://127.0.0.1:{value(command, '--port')}" for command in commands] == [r.url for r in replicas]
    assert len({r.url for r in replicas}) == 3 and all(r.url.startswith("http://127.0.0.1:") for r in replicas)
    fixed = servers(RolloutConfig(replicas=2, port=6000), tmp_path)
    assert [r.url for r in fixed] == ["http://127.0.0.1:6000", "http://127.0.0.1:6001"]


def test_attached_servers_are_not_started(tmp_path):
    config = RolloutConfig(servers=["http://a:1/", "http://b:2"])
    replicas = servers(config, tmp_path)
    assert [(r.url, r.process) for r in replicas] == [("http://a:1", None), ("http://b:2", None)]


def test_a_vllm_servers_gpus_are_counted_among_those_that_the_trainer_sees(tmp_path, monkeypatch):
    def gpus(visible: str | None) -> list[str]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        config = RolloutConfig(engine="vllm", first_gpu=1, replicas=2, tensor=2)
        replicas = servers(config, tmp_path, vllm.server_command, "cuda")
        return [r.process._environment["CUDA_VISIBLE_DEVICES"] for r in replicas]

    assert gpus(None) == ["1,2", "3,4"]
    assert gpus("2,3,5,6,7") == ["3,5", "6,7"]


def test_vllm_command():
    config = RolloutConfig(engine="vllm", tensor=4, server_args=["--seed", "1"])
    server = vllm.server_command(spec(config, "cuda", torch.bfloat16), 0, 7000, 100)
    command = server.arguments
    assert command[2] == "vllm.entrypoints.openai.api_server" and value(command, "--served-model-name") == "policy"
    assert value(command, "--max-model-len") == "101" and value(command, "--tensor-parallel-size") == "4"
    assert value(command, "--dtype") == "bfloat16" and server.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert command[-2:] == ["--seed", "1"]


def test_a_vllm_server_reads_the_files_that_the_policy_reads():
    """Its "auto" prefers Mistral's format; what a user sets comes later and wins."""
    config = RolloutConfig(engine="vllm", server_args=["--load-format", "dummy"])
    command = vllm.server_command(spec(config, "cuda"), 0, 7000, 100).arguments
    assert value(command, "--config-format") == "hf" and value(command, "--tokenizer-mode") == "hf"
    assert value(command, "--load-format") == "safetensors" and command[-2:] == ["--load-format", "dummy"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_vllm_server_on_a_cpu_is_kept_within_bounds(tmp_path, monkeypatch, tied):
    """The cache: what the requests in flight need, at least 8,192 tokens, 4 GiB at most, where vLLM would take nearly
    all memory. Each server's worker would be bound to the same core."""
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    tiny_qwen3(100, head_dim=32, tie_word_embeddings=tied).save_pretrained(tmp_path)
    a_token = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, head_dim, fp32

    def started(concurrency: int):
        config = RolloutConfig(engine="vllm", n=8, concurrency=concurrency)
        return vllm.server_command(engine_spec(config, tmp_path, tmp_path), 0, 7000, 1000)

    assert [int(value(started(concurrency).arguments, "--kv-cache-memory-bytes")) for concurrency in (1, 64, 4096)] == [
        8192 * a_token,
        64 * 8 * 500 * a_token,
        4 * 2**30,
    ]
    server = started(1)
    assert "--enforce-eager" in server.arguments and "CUDA_VISIBLE_DEVICES" not in server.environment
    assert server.environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert ("--worker-extension-cls" in server.arguments) == tied
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    assert started(1).environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


def test_a_model_that_vllm_cannot_serve_on_a_cpu_is_refused_before_a_start(tmp_path):
    tiny_qwen3(100, head_dim=16).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="config.json: head_dim 16: vLLM has no attention for it on a CPU"):
        vllm.server_command(engine_spec(RolloutConfig(engine="vllm"), tmp_path, tmp_path), 0, 7000, 100)

"""Command lines of local servers."""

from pathlib import Path

import torch

from real_megatron.config import RolloutConfig
from real_megatron.rollout.sglang.command import local_servers, server_command
from real_megatron.rollout.vllm import engine as vllm


def value(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_a_gpu_server_takes_its_own_gpus_and_the_users_arguments_win():
    config = RolloutConfig(tensor=2, first_gpu=4, python="/venv/python", server_args=["--dtype", "half"], colocate=True)
    command = server_command(config, Path("/m"), 3, 5000, "cuda", torch.bfloat16, 3072)
    assert command[0] == "/venv/python" and command[2] == "sglang.launch_server"
    assert value(command, "--base-gpu-id") == "10" and value(command, "--tp") == "2"
    assert value(command, "--host") == "127.0.0.1" and value(command, "--port") == "5000"
    assert value(command, "--dtype") == "bfloat16" and command[-2:] == ["--dtype", "half"]
    assert value(command, "--context-length") == "3074"
    assert "--enable-memory-saver" in command and "cpu" not in command


def test_a_cpu_server_uses_the_torch_native_path():
    command = server_command(RolloutConfig(), Path("/m"), 0, 5000, "cpu", torch.float32, 128)
    assert value(command, "--device") == "cpu" and value(command, "--attention-backend") == "torch_native"
    assert int(value(command, "--max-total-tokens")) >= 8192


def test_every_local_server_has_a_port_of_its_own(tmp_path):
    replicas = local_servers(RolloutConfig(replicas=3), tmp_path, tmp_path, "cpu", torch.float32, 128)
    assert len({r.url for r in replicas}) == 3 and all(r.url.startswith("http://127.0.0.1:") for r in replicas)
    fixed = local_servers(RolloutConfig(replicas=2, port=6000), tmp_path, tmp_path, "cpu", torch.float32, 128)
    assert [r.url for r in fixed] == ["http://127.0.0.1:6000", "http://127.0.0.1:6001"]


def test_attached_servers_are_not_started(tmp_path):
    config = RolloutConfig(servers=["http://a:1/", "http://b:2"])
    replicas = local_servers(config, tmp_path, tmp_path, "cpu", torch.float32, 128)
    assert [(r.url, r.process) for r in replicas] == [("http://a:1", None), ("http://b:2", None)]


def test_a_vllm_servers_gpus_are_counted_among_those_that_the_trainer_sees(tmp_path, monkeypatch):
    def gpus(visible: str | None) -> list[str]:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        config = RolloutConfig(engine="vllm", first_gpu=1, replicas=2, tensor=2)
        replicas = vllm._replicas(config, tmp_path, tmp_path, torch.bfloat16, 100)
        return [r.process._environment["CUDA_VISIBLE_DEVICES"] for r in replicas]

    assert gpus(None) == ["1,2", "3,4"]
    assert gpus("2,3,5,6,7") == ["3,5", "6,7"]


def test_vllm_command():
    config = RolloutConfig(engine="vllm", tensor=4, server_args=["--seed", "1"])
    command = vllm.server_command(config, Path("/m"), 7000, torch.bfloat16, 100)
    assert command[2] == "vllm.entrypoints.openai.api_server" and value(command, "--served-model-name") == "policy"
    assert value(command, "--max-model-len") == "101" and value(command, "--tensor-parallel-size") == "4"
    assert command[-2:] == ["--seed", "1"]

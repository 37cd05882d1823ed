"""Servers that could not work are refused before a model is loaded."""

import pytest
import torch

from real_megatron.config import RolloutConfig
from real_megatron.rollout.factory import _check_gpus, check_servers
from real_megatron.sections import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"python": "/no/such/python"}, "rollout.python: /no/such/python is not there"),
        ({}, "sglang, which is not installed beside the trainer: name the Python .* in rollout.python"),
        (
            {"servers": ["http://127.0.0.1:1", "http://node4:30000"]},
            "rollout.sync_host is 127.0.0.1, by which the server http://node4:30000 does not reach this host",
        ),
    ],
)
def test_what_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_servers(RolloutConfig(engine="sglang", **settings), trainer=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": "transformers", "python": "/no/such/python"},
        {"engine": "sglang", "python": "python3"},
        {"engine": "sglang", "servers": ["http://localhost:1"]},
        {"engine": "sglang", "servers": ["http://node4:1"], "sync_host": "10.0.0.1"},
        {"engine": "sglang", "servers": ["http://node4:1"], "weight_sync": "disk"},
        {"engine": "vllm", "servers": ["http://node4:1"]},
    ],
)
def test_what_can_work_passes(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_servers(RolloutConfig(**settings), trainer=True)


def test_who_only_evaluates_sends_no_weights():
    check_servers(RolloutConfig(engine="sglang", servers=["http://node4:1"]), trainer=False)


def test_servers_get_gpus_that_are_there_and_free():
    config = RolloutConfig(engine="sglang", first_gpu=4, replicas=2, tensor=2)
    _check_gpus(config, gpus=8, trainers=4)
    with pytest.raises(ConfigError, match="= 4 GPUs from rollout.first_gpu = 4 on do not fit into the 7 GPUs"):
        _check_gpus(config, gpus=7, trainers=4)
    with pytest.raises(ConfigError, match="also those of the 5 training ranks of this node: start fewer ranks"):
        _check_gpus(config, gpus=8, trainers=5)
    _check_gpus(config.model_copy(update={"colocate": True}), gpus=8, trainers=8)

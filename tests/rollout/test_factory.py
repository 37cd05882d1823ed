"""Engines by name; servers that could not work are refused before a model is loaded."""

import subprocess
import sys
import tempfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import ConfigError
from real_megatron.rollout import nccl
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.factory import Node, _check_gpus, build_engine, check_servers, find_engine
from tests.support.rollout_fake_server import python_that_runs
from tests.support.rollout_models import byte_level, tiny_qwen3
from tests.support.rollout_specs import engine_spec


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"python": "/no/such/python"}, "rollout.python: /no/such/python is not there"),
        ({}, "sglang is not installed beside the trainer: name the Python .* in rollout.python"),
        (
            {"servers": ["http://127.0.0.1:1", "http://node4:30000"]},
            "rollout.sync_host is 127.0.0.1, by which the server http://node4:30000 does not reach this host",
        ),
    ],
)
def test_what_cannot_work_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_servers(RolloutConfig(engine="sglang", **settings), trainer=True)


@pytest.mark.parametrize(("length", "fits"), [(70, True), (71, False)])
def test_a_tmpdir_without_room_for_the_servers_sockets_is_named(length, fits, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * (length - len("/tmp/")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RolloutConfig(engine="sglang", python="python3")
    if fits:
        check_servers(config, trainer=True)
    else:
        with pytest.raises(ConfigError, match=r"TMPDIR has 71 bytes \(/tmp/x+\).* such as /tmp"):
            check_servers(config, trainer=True)
    check_servers(RolloutConfig(), trainer=True)  # no servers, no sockets


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
    _check_gpus(config, Node(8, trainers=4))
    with pytest.raises(ConfigError, match="= 4 GPUs from rollout.first_gpu = 4 on do not fit into the 7 GPUs"):
        _check_gpus(config, Node(7, trainers=4))
    with pytest.raises(ConfigError, match="also those of the 5 training ranks of this node: start fewer ranks"):
        _check_gpus(config, Node(8, trainers=5))
    _check_gpus(config.model_copy(update={"colocate": True}), Node(8, trainers=8))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "print('2.27.5')",
            "trainer has NCCL 2.28.9, the servers' .*rollout.python: .* NCCL 2.27.5: .* same nvidia-nccl",
        ),
        ("raise SystemExit('No module named torch')", "rollout.python: the torch of .* does not tell .*: No module"),
        ("print('a line of sitecustomize'); print('2.28.9')", None),
    ],
)
def test_servers_of_another_nccl_are_refused_before_a_model_is_loaded(answer, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    config = RolloutConfig(engine="sglang", python=python_that_runs(tmp_path, answer), first_gpu=4)
    if message is None:
        check_servers(config, trainer=True)
        return
    with pytest.raises(ConfigError, match=message):
        check_servers(config, trainer=True)
    for other in ({"weight_sync": "disk"}, {"colocate": True}, {"engine": "vllm"}):
        check_servers(config.model_copy(update=other), trainer=True)  # no broadcast
    check_servers(config, trainer=False)


def test_nccl_is_asked_for_its_version_in_the_servers_environment(tmp_path):
    """What is run there is a program: here with a torch that tells one."""
    (tmp_path / "torch.py").write_text("class cuda:\n class nccl:\n  version = lambda: (2, 28, 9, 'rc1')\n")
    asked = subprocess.run([sys.executable, "-c", nccl._ASK], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert asked.stdout == "2.28.9.rc1\n", asked.stderr


def test_an_engine_of_a_users_own_module_is_found_and_built(tmp_path):
    config = RolloutConfig(engine="tests.support.rollout_own_engine:scripted")
    check_servers(config, trainer=True)
    engine = build_engine(engine_spec(config, tmp_path, tmp_path, max_response_tokens=5))
    assert engine.generate([[1]], SamplingParams())[0][0].token_ids == [7] * 5


@pytest.mark.parametrize("ask", [find_engine, lambda name: check_servers(RolloutConfig(engine=name), trainer=False)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sglan", r"rollout.engine: unknown engine 'sglan'; known: (\w+, )*sglang, transformers, vllm, or module:name"),
        ("tests.support.rollout_own_engine:other", "neither registers nor defines 'other'"),
        ("tests.support.rollout_own_engine:unregistered", "is not registered as an engine: .* register_engine"),
        ("tests.no_such_module:engine", "module tests.no_such_module cannot be imported"),
    ],
)
def test_an_unknown_engine_is_named(ask, name, message):
    with pytest.raises(ConfigError, match=message):
        ask(name)


@pytest.mark.parametrize(
    ("name", "on_every_rank", "package", "broadcasts"),
    [("transformers", True, "", False), ("sglang", False, "sglang", True), ("vllm", False, "vllm", False)],
)
def test_what_is_built_in_says_what_it_is(name, on_every_rank, package, broadcasts):
    kind = find_engine(name)
    assert (kind.on_every_rank, kind.server_package, kind.broadcasts) == (on_every_rank, package, broadcasts)


@pytest.mark.parametrize("serve_loaded", [False, True])
def test_the_embedded_engine_is_built_from_a_checkpoint(tmp_path, serve_loaded):
    model = AutoModelForCausalLM.from_config(tiny_qwen3(320))
    model.save_pretrained(tmp_path)
    config = RolloutConfig(batch_size=3)
    engine = build_engine(
        engine_spec(config, tmp_path, tmp_path, tokenizer=byte_level(), serve_loaded=serve_loaded, dtype=torch.bfloat16)
    )
    assert isinstance(engine, TransformersEngine) and engine.batch_size == 3 and engine.model.dtype == torch.bfloat16
    assert engine.version == (0 if serve_loaded else None)
    served, saved = engine.model.lm_head.weight, model.lm_head.weight.bfloat16()
    assert torch.equal(served, saved) == serve_loaded

"""What the remote engines hand on of `rollout.*`, at settings that differ from their defaults."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.sglang import engine as sglang
from real_megatron.rollout.sglang.disk_transport import DiskTransport
from real_megatron.rollout.sglang.distributed_transport import DistributedTransport
from real_megatron.rollout.sglang.tensor_transport import TensorTransport
from real_megatron.rollout.vllm import engine as vllm
from tests.support.rollout_fake_server import VOCABULARY, expected_ids
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec

ENGINES = {"sglang": (sglang, sglang.SGLangEngine), "vllm": (vllm, vllm.VLLMEngine)}
PARAMS = SamplingParams(n=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(tiny_qwen3(VOCABULARY, max_position_embeddings=64))


@pytest.fixture(params=["sglang", "vllm"])
def flavour(request):
    return request.param


@pytest.fixture
def make(tmp_path, model, servers):
    """make(flavour, fields of the specification, **rollout settings) -> engine and its one fake server."""
    model.save_pretrained(tmp_path / "model")
    engines = []

    def build(flavour, fields=None, **settings):
        (fake,) = servers(1, flavour)
        fake.model_path = str(tmp_path / "model")
        config = RolloutConfig(engine=flavour, servers=[fake.url], **{"weight_sync": "disk"} | settings)
        engines.append(ENGINES[flavour][1](engine_spec(config, tmp_path / "model", tmp_path / "work", **fields or {})))
        return engines[-1], fake

    yield build
    for engine in engines:
        engine.close()


def test_limits_are_the_configured_ones(make, servers, flavour):
    (router,) = servers(1, flavour)
    limits = {"concurrency": 3, "start_timeout_s": 7, "restarts": 5, "timeout_s": 11, "attempts": 13}
    engine, _ = make(flavour, router=router.url + "/", sync_timeout_s=17, **limits)
    pool, client = engine._pool, engine._client
    assert (pool._concurrency, pool._start_timeout_s, pool._restarts) == (3, 7, 5)
    assert (client._timeout_s, client._attempts, client._router) == (11, 13, router.url)
    # Each smaller step of a sync has two minutes at most.
    assert (engine._control.timeout_s, engine._control.step_s) == (17, 17)
    longer, _ = make(flavour, sync_timeout_s=700)
    assert (longer._control.timeout_s, longer._control.step_s) == (700, 120)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"weight_sync": "auto"}, DistributedTransport),
        ({"weight_sync": "auto", "colocate": True}, TensorTransport),
        ({"weight_sync": "distributed", "colocate": True}, DistributedTransport),
        ({"weight_sync": "tensor"}, TensorTransport),
        ({"weight_sync": "disk"}, DiskTransport),
    ],
)
def test_weights_take_the_configured_way(make, settings, kind):
    engine, _ = make("sglang", sync_host="10.1.2.3", **settings)
    assert type(engine._transport) is kind
    if kind is DistributedTransport:
        assert engine._transport._host == "10.1.2.3"


def test_weights_are_sent_in_buckets_of_the_served_dtype(make, flavour, model, monkeypatch):
    module, asked = ENGINES[flavour][0], []
    real = module.bucketed
    monkeypatch.setattr(module, "bucketed", lambda *of: asked.append(of[1:]) or real(of[0], 4096, of[2]))
    engine, fake = make(flavour, {"dtype": torch.bfloat16}, bucket_mib=3)
    engine.update_weights(model.named_parameters(), 1)
    assert asked == [(3 * 2**20, torch.bfloat16)]
    files = set(json.loads((Path(fake.loaded) / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(files) > 2
    for file in files:
        with safe_open(Path(fake.loaded) / file, "pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize("keep", [True, False])
def test_weights_are_kept_for_servers_that_come_back_where_configured(make, model, keep):
    """As after a restart by somebody else. With a sync by disk the checkpoint is there anyway."""
    engine, fake = make("sglang", weight_sync="tensor", keep_weights=keep)
    engine.update_weights(model.named_parameters(), 1)
    label = fake.version
    fake.version = "default"
    if keep:
        assert engine.generate([[1, 2]], PARAMS)[0][0].token_ids == expected_ids([1, 2], 0, 6)
        assert fake.version == label
        return
    with pytest.raises(EngineError, match="is stale .its weights are gone and rollout.keep_weights is off"):
        engine.generate([[1, 2]], PARAMS)


def test_seeds_reach_vllm_one_a_prompt(make):
    """62 bits of them; SGLang's requests have none, since all samples of one would get it."""
    seeds = [5, 2**62 + 7]
    for flavour, expected in (("vllm", [5, 7]), ("sglang", [None, None])):
        engine, fake = make(flavour, {"serve_loaded": True})
        engine.generate([[1, 2], [3, 4]], PARAMS, seeds)
        asked = sorted(fake.bodies, key=lambda body: body.get("prompt") or body["input_ids"])
        assert [body.get("seed") for body in asked] == expected
        engine.generate([[1, 2]], PARAMS)
        assert "seed" not in fake.bodies[-1]


def test_vllm_requests_name_every_parameter(make):
    engine, fake = make("vllm", {"serve_loaded": True})
    params = SamplingParams(n=2, temperature=1, top_p=0.9, max_new_tokens=7, stop=("x", "y"), watch_ids=(9, 4))
    engine.generate([[1, 2]], params)
    (body,) = fake.bodies
    assert body.pop("stop_token_ids") and body == {
        "model": "policy",
        "prompt": [1, 2],
        "n": 2,
        "temperature": 1,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "max_tokens": 7,
        "stop": ["x", "y"],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": 2,
        "logprob_token_ids": [9, 4],
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


@pytest.mark.parametrize("serve_loaded", [True, False])
def test_what_is_released_is_what_comes_back(make, flavour, model, serve_loaded):
    """A server keeps the weights that it has loaded itself: nobody would send them again."""
    engine, fake = make(flavour, {"serve_loaded": serve_loaded})
    if not serve_loaded:
        engine.update_weights(model.named_parameters(), 1)
    fake.calls.clear()
    engine.sleep()
    asleep, fake.calls[:] = list(fake.calls), []
    engine.wake()
    calls = dict(fake.calls)
    if flavour == "sglang":
        released = ["kv_cache"] if serve_loaded else ["weights", "kv_cache", "cuda_graph"]
        assert asleep == [
            ("/pause_generation", {"mode": "abort"}),
            ("/release_memory_occupation", {"tags": released}),
        ]
        assert calls["/resume_memory_occupation"] == {"tags": released} and not fake.paused
        assert ("/update_weights_from_disk" in calls) == (not serve_loaded)
        return
    assert [path for path, _ in asleep] == ["/pause?mode=abort", f"/sleep?level={1 if serve_loaded else 2}"]
    assert "/wake_up" in calls and not fake.paused
    assert ("/collective_rpc" in calls) == (not serve_loaded)


def test_vllm_wakes_weights_before_the_cache(make, model):
    engine, fake = make("vllm")
    engine.update_weights(model.named_parameters(), 1)
    engine.sleep()
    fake.calls.clear()
    engine.update_weights(model.named_parameters(), 2)
    engine.wake()
    woken = [path for path, _ in fake.calls if path.startswith("/wake_up")]
    assert woken == ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"] and not fake.paused

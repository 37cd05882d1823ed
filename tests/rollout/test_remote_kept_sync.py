"""Kept weights are never read while they are replaced: servers that come back around a sync."""

import base64
import pickle
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote import client
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.kept import KeptWeights
from real_megatron.rollout.sglang import engine as sglang
from tests.support.rollout_fake_server import VOCABULARY
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec

PARAMS = SamplingParams(n=1, max_new_tokens=8)
TENSOR = "/update_weights_from_tensor"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(tiny_qwen3(VOCABULARY, max_position_embeddings=64))


@pytest.fixture
def served(tmp_path, model, servers, monkeypatch):
    """An engine that copies what it keeps, its one fake server, and the value of each tensor that this has been sent;
    several buckets a sync."""
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(sglang, "bucketed", reused)
    (fake,) = servers(1)
    fake.model_path = str(tmp_path / "model")
    received: list[float] = []
    answer = fake.control

    def control(path, body):
        if path == TENSOR:
            for _, tensor in pickle.loads(base64.b64decode(body["serialized_named_tensors"][0])):
                assert len(tensor.unique()) == 1, "weights of two syncs in one tensor"
                received.append(float(tensor.flatten()[0]))
        return answer(path, body)

    fake.control = control
    config = RolloutConfig(engine="sglang", servers=[fake.url], weight_sync="tensor")
    engine = sglang.SGLangEngine(engine_spec(config, tmp_path / "model", tmp_path / "work"))
    engine._kept = SlowlyKept(copies=True)
    yield engine, fake, received
    engine.close()


class SlowlyKept(KeptWeights):
    """The copy of a set's first bucket is later than the transport."""

    def _keep(self, bucket):
        if not self._held:
            time.sleep(0.3)
        super()._keep(bucket)


def reused(stream, _, dtype):
    """Small buckets whose memory is used again as soon as the next one is asked for."""
    for one in bucketed(stream, 4096, dtype):
        yield one
        one.flat.zero_()


def weights(model, value):
    """A model's tensors, all of one value."""
    for name, tensor in model.named_parameters():
        yield name, torch.full_like(tensor, value)


async def recovered(engine):
    """As after a health check that was missed."""
    for replica in engine._pool.replicas:
        engine._pool.recover(replica, "on demand")
    await engine._pool.settled()


def test_a_server_that_comes_back_in_mid_sync_waits_for_its_end(served, model):
    engine, fake, received = served
    count = len(list(model.named_parameters()))
    engine.update_weights(weights(model, 1.0), 1)
    assert received == [1.0] * count
    received.clear()

    def stream():
        for i, named in enumerate(weights(model, 2.0)):
            if i == count // 2:
                sent = len(received)
                assert 0 < sent < count
                engine._loop.run(recovered(engine))
                (replica,) = engine._pool.replicas
                assert (replica.state, replica.reason) == ("stale", "waiting for the next sync")
                assert len(received) == sent and fake.version.endswith("-incomplete")
            yield named

    engine.update_weights(stream(), 2)
    assert received == [2.0] * count and fake.version.endswith("-2")
    # Started anew behind the sync, it gets the kept weights, all of them.
    received.clear()
    fake.version = "default"
    assert engine.generate([[1, 2]], PARAMS)[0][0].weight_version == 2
    assert received == [2.0] * count and fake.version.endswith("-2")


def test_a_sync_waits_for_a_server_that_is_brought_up_to_date(served, model):
    """It reads the kept weights, whose memory the sync uses again."""
    engine, fake, received = served
    count = len(list(model.named_parameters()))
    engine.update_weights(weights(model, 1.0), 1)
    received.clear()
    reached, go_on, asked = threading.Event(), threading.Event(), threading.Event()
    answer = fake.control

    def slow(path, body):
        if path == TENSOR and not go_on.is_set():
            reached.set()
            go_on.wait(60)
        return answer(path, body)

    def stream():
        asked.set()
        yield from weights(model, 2.0)

    fake.version, fake.control = "default", slow
    restore = engine._loop.submit(recovered(engine))
    assert reached.wait(60)
    sync = threading.Thread(target=engine.update_weights, args=(stream(), 2))
    sync.start()
    assert not asked.wait(0.5), "the sync has begun while a server reads the kept weights"
    go_on.set()
    sync.join(60)
    restore.result(60)
    assert received == [1.0] * count + [2.0] * count and fake.version.endswith("-2")

"""The order of publishing, generating and training."""

import threading
import time

import pytest

from real_megatron.rollout.overlap import rollouts


class Run:
    """A policy that counts its steps, and an engine that has the weights last published."""

    def __init__(self):
        self.policy = 0
        self.engine = None
        self.generating = threading.Event()
        self.log = []

    def publish(self):
        assert not self.generating.is_set(), "weights changed under a running generation"
        self.engine = self.policy

    def generate(self, batch):
        self.generating.set()
        time.sleep(0.02)
        result = batch, self.engine
        self.generating.clear()
        self.log.append(("generated", batch))
        return result

    def train(self, staleness, batches=5):
        used = []
        for batch, (generated, weights) in rollouts(range(batches), self.generate, self.publish, staleness):
            assert batch == generated
            used.append(self.policy - weights)
            time.sleep(0.04)
            self.policy += 1
            self.log.append(("trained", batch))
        return used


def test_without_staleness_every_batch_uses_the_newest_weights():
    run = Run()
    assert run.train(0) == [0] * 5
    assert run.log == [(what, b) for b in range(5) for what in ("generated", "trained")]


def test_one_step_off_generates_ahead_with_weights_one_step_old():
    run = Run()
    assert run.train(1) == [0, 1, 1, 1, 1]
    # The next batch is generated while this one trains.
    assert run.log.index(("generated", 2)) < run.log.index(("trained", 1))


@pytest.mark.parametrize("staleness", [0, 1])
def test_no_batches(staleness):
    assert list(rollouts([], None, None, staleness)) == []


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_error_appears_where_its_batch_would(staleness):
    def generate(batch):
        if batch == 2:
            raise RuntimeError("server gone")
        return batch

    seen = []
    with pytest.raises(RuntimeError, match="server gone"):
        for batch, _ in rollouts(range(5), generate, lambda: None, staleness):
            seen.append(batch)
    assert seen == [0, 1]


def test_stopping_early_leaves_no_thread():
    run = Run()
    stream = rollouts(range(5), run.generate, run.publish, 1)
    next(stream)
    stream.close()
    assert not any(thread.name.startswith("rollout") for thread in threading.enumerate())


def test_more_staleness_is_refused():
    with pytest.raises(ValueError, match="0 or 1"):
        list(rollouts([1], None, None, 2))

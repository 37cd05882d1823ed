"""The order of publishing, generating and training when rollouts are one step off."""

import threading
import time

import pytest

from real_megatron.training.one_step_off import OneStepOff


class Run:
    """A policy that counts its steps, and an engine that has the weights last published."""

    def __init__(self) -> None:
        self.policy = 0
        self.engine = -1
        self.generating = threading.Event()
        self.log: list[tuple[str, int]] = []

    def publish(self, done: int) -> None:
        assert not self.generating.is_set(), "weights changed under a running generation"
        assert done == self.policy
        self.engine = self.policy

    def generate(self, step: int) -> tuple[int, int]:
        self.generating.set()
        time.sleep(0.02)
        result = step, self.engine
        self.generating.clear()
        self.log.append(("generated", step))
        return result


def test_the_next_batch_is_generated_ahead_with_weights_one_step_old() -> None:
    run, used = Run(), []
    with OneStepOff(run.generate, run.publish, range(5)) as ahead:
        for step in range(5):
            generated, weights = ahead.take(step)
            assert generated == step
            used.append(run.policy - weights)
            if step == 1:
                # The next batch is generated while this one trains: training waits for it here.
                while ("generated", 2) not in run.log:
                    time.sleep(0.001)
            run.policy += 1
            run.log.append(("trained", step))
    assert used == [0, 1, 1, 1, 1]
    assert run.log.index(("generated", 2)) < run.log.index(("trained", 1))
    assert [step for what, step in run.log if what == "generated"] == list(range(5)), "nothing beyond the last step"


def test_a_resumed_run_begins_with_its_own_step() -> None:
    run = Run()
    run.policy = 3
    with OneStepOff(run.generate, run.publish, range(3, 5)) as ahead:
        assert ahead.take(3) == (3, 3)
        run.policy += 1
        assert ahead.take(4) == (4, 3)


def test_an_error_appears_at_its_step() -> None:
    def generate(step: int) -> int:
        if step == 2:
            raise RuntimeError("server gone")
        return step

    seen = []
    with pytest.raises(RuntimeError, match="server gone"), OneStepOff(generate, lambda done: None, range(5)) as ahead:
        for step in range(5):
            seen.append(ahead.take(step))
    assert seen == [0, 1]


def test_an_error_does_not_wait_for_a_generation_under_way() -> None:
    """A server that hangs must not keep a failed rank from ending; the engine is closed behind the context."""
    started, closed, ended = threading.Event(), threading.Event(), threading.Event()

    def generate(step: int) -> int:
        if step:
            started.set()
            assert closed.wait(60)
            ended.set()
        return step

    with pytest.raises(FloatingPointError), OneStepOff(generate, lambda done: None, range(5)) as ahead:
        assert ahead.take(0) == 0 and started.wait(60)
        raise FloatingPointError
    assert not ended.is_set()
    closed.set()
    assert ended.wait(60)


def test_stopping_early_leaves_no_thread() -> None:
    run = Run()
    with OneStepOff(run.generate, run.publish, range(5)) as ahead:
        ahead.take(0)
    assert not any(thread.name.startswith("rollout") for thread in threading.enumerate())

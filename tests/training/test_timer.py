"""The phases of a step sum to the step."""

import pytest

from real_megatron.training import timer as timer_module
from real_megatron.training.timer import PhaseTimer


def test_phases_and_the_rest_sum_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 10.0, 11.0, 13.0, 20.0])
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    with timer.phase("rollout"):
        pass
    with timer.phase("update"):
        pass
    assert timer.finish() == {"rollout": 2.0, "update": 1.0, "other": 7.0, "step": 10.0}
    with timer.phase("update"):
        pass
    assert timer.finish() == {"update": 2.0, "other": 8.0, "step": 10.0}


def test_an_inner_phase_pauses_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0, 8.0, 8.0])
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    with timer.phase("rollout"), timer.phase("sync"):
        pass
    assert timer.finish() == {"other": 1.0, "rollout": 3.0, "sync": 4.0, "step": 8.0}


def test_a_phase_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(timer_module.time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    with pytest.raises(OSError), timer.phase("rollout"):
        raise OSError
    assert timer.finish() == {"other": 5.0, "rollout": 2.0, "step": 7.0}

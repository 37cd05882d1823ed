"""SIGTERM is received once, however often it comes within the first seconds."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from real_megatron.training import stop
from real_megatron.training.stop import StopSignal
from tests.support.ranks import run_ranks
from tests.support.training_ranks import asked_to_stop

CPU = torch.device("cpu")


class Ended(Exception):
    """What SIGTERM's ordinary course is in these tests."""


@pytest.fixture(autouse=True)
def ordinary_course() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_echo_of_a_launcher_is_no_second_signal() -> None:
    with StopSignal(CPU) as signals:
        assert not signals.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested()


def test_a_later_signal_takes_its_ordinary_course(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "_ECHO_S", 0)
    with StopSignal(CPU):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Ended):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_it_nothing_is_received() -> None:
    with StopSignal(CPU):
        pass
    with pytest.raises(Ended):
        os.kill(os.getpid(), signal.SIGTERM)


def test_all_ranks_stop_where_one_has_received_the_signal() -> None:
    """Else the others would wait for it in the next step."""
    assert run_ranks(2, asked_to_stop, 1) == [(False, True), (False, True)]

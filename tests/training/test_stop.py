"""SIGTERM and SIGINT are received once, however often SIGTERM comes within the first seconds."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from real_megatron.training.stop import StopSignal
from tests.support.ranks import run_ranks
from tests.support.training_ranks import asked_to_stop

CPU = torch.device("cpu")

# Signals itself with the numbers of its arguments; `wait` lets 10 s pass.
SIGNALLED = """
import os, signal, sys, time, torch
from real_megatron.training import stop
from real_megatron.training.stop import StopSignal
with StopSignal(torch.device("cpu")) as signals:
    for argument in sys.argv[1:]:
        if argument == "wait":
            stop._ECHO_S = 0
        else:
            os.kill(os.getpid(), int(argument))
    print(signals.requested())
"""


def signalled(*what: int | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SIGNALLED, *map(str, what)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_received_and_afterwards_takes_its_ordinary_course(number: int) -> None:
    class Ended(Exception):
        pass

    def end(number: int, frame: object) -> None:
        raise Ended

    before = signal.signal(number, end)
    try:
        with StopSignal(CPU) as signals:
            assert not signals.requested()
            os.kill(os.getpid(), number)
            assert signals.requested() == number
        with pytest.raises(Ended):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_the_echo_of_a_launcher_is_no_second_signal() -> None:
    done = signalled(signal.SIGTERM, signal.SIGTERM)
    assert (done.returncode, done.stdout.strip()) == (0, str(int(signal.SIGTERM)))


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGTERM, "wait", signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),  # what torchrun sends after a second Ctrl-C
    ],
)
def test_a_second_signal_ends_the_process_at_once(signals: tuple[int | str, ...]) -> None:
    """As the system does it, without a traceback."""
    done = signalled(*signals)
    assert (done.returncode, done.stdout, done.stderr) == (-int(signals[-1]), "", "")


def test_all_ranks_stop_where_one_has_received_the_signal() -> None:
    """Else the others would wait for it in the next step."""
    assert run_ranks(2, asked_to_stop, 1) == [(0, signal.SIGTERM), (0, signal.SIGTERM)]

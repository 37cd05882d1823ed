"""Child processes end with their parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PARENT = """
import multiprocessing, time
from real_megatron.processes import forks_end_with_us
fork = multiprocessing.get_context("fork")
outside, inside = (fork.Process(target=time.sleep, args=(30,)) for _ in range(2))
outside.start()
with forks_end_with_us():
    inside.start()
print(outside.pid, inside.pid, flush=True)
time.sleep(30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child of its parent's death")
def test_what_is_forked_inside_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], text=True
    )
    assert parent.stdout is not None
    outside, inside = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    try:
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 20
        while inside.is_running() and inside.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not inside.is_running() or inside.status() == psutil.STATUS_ZOMBIE
        assert outside.status() != psutil.STATUS_ZOMBIE, "forks of other packages are left alone"
    finally:
        parent.stdout.close()
        os.kill(outside.pid, 9)

"""Worker processes of a conversion: nothing of them is left when one of them fails."""

import signal
import sys
import time
from pathlib import Path

import pytest

from real_megatron.bridge.workers import run
from real_megatron.errors import CheckpointError
from tests.support.worker_tasks import signals, write_on_and_on


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("raise", ValueError, "no such tensor"),
        ("die", CheckpointError, "a worker process was killed, most often for want of memory; run again with fewer"),
    ],
)
def test_no_process_still_writes_when_a_task_has_failed(
    tmp_path: Path, kind: str, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "output"
    folder.mkdir()
    with pytest.raises(error, match=message):
        run(write_on_and_on, [("write", folder), (kind, folder)], 3000, workers=2, title="test", show_progress=False)
    count = len(list(folder.iterdir()))
    assert 0 < count < 3000, "the other task stops at its next progress report, not at its end"
    time.sleep(0.1)
    assert len(list(folder.iterdir())) == count


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child of its parent's death")
def test_a_process_leaves_ctrl_c_to_its_parent_and_dies_with_it() -> None:
    found = run(signals, [0, 1], 2, workers=2, title="test", show_progress=False)
    assert found == [(True, signal.SIGKILL)] * 2

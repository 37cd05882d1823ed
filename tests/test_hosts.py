"""Hosts for tests (tests/support/hosts.py): reached by ssh, cut off, joined again, and gone at the end."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.hosts import Hosts, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())


def interfaces() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout


def reached(hosts: Hosts, source: str, target: str) -> bool:
    """Whether a host reaches the ssh server of another."""
    probe = f"exec 3<>/dev/tcp/{hosts.address(target)}/2222 && head -c 4 <&3"
    command = [*hosts.inside(source), "timeout", "1", "bash", "-c", probe]
    return subprocess.run(command, capture_output=True).stdout == b"SSH-"


def test_a_host_can_be_cut_off_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of the test"), Hosts(2, tmp_path) as hosts:
        listed = subprocess.run([*hosts.ssh, "h1", "ip", "addr"], capture_output=True, text=True, check=True).stdout
        assert hosts.address("h1") in listed and hosts.address("h2") not in listed
        assert reached(hosts, "h1", "h2")
        sleeping = subprocess.Popen([*hosts.ssh, "h2", "sleep 1000"])
        deadline = time.monotonic() + 10
        while "sleep 1000" not in hosts.processes("h2").values() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "sleep 1000" in hosts.processes("h2").values()
        hosts.cut("h2")
        assert not reached(hosts, "h1", "h2")
        assert "sleep 1000" in hosts.processes("h2").values() and sleeping.poll() is None
        hosts.join("h2")
        hosts.wait_reachable("h2")
        assert reached(hosts, "h1", "h2")
        bridge, namespace, running = hosts._bridge, hosts.namespace("h1"), list(hosts.processes("h2"))
        assert bridge in interfaces()
        raise RuntimeError("of the test")
    sleeping.wait(10)
    assert bridge not in interfaces()
    assert namespace not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    # One whose parent died first may still be listed, as a zombie.
    assert running and not any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in running)


def test_hosts_are_files_of_their_own(hosts: Hosts, tmp_path: Path) -> None:
    path = hosts.write(tmp_path / "hosts", "h1 slots=2", "h3 slots=1 role=rollout")
    assert path.read_text() == (
        f"h1 slots=2 address={hosts.address('h1')}\nh3 slots=1 role=rollout address={hosts.address('h3')}\n"
    )

"""`real-megatron doctor --cluster` on hosts of their own networks: a good pair, and one fault each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from real_megatron.cluster import preflight as module
from real_megatron.cluster.hostfile import Host, read_hosts
from real_megatron.cluster.preflight import RENDEZVOUS_PORT, SERVER_PORT, preflight
from real_megatron.cluster.ssh import ssh_command
from real_megatron.config import RunConfig
from real_megatron.doctor.finding import Finding
from real_megatron.errors import ConfigError
from tests.support.hosts import Hosts, missing
from tests.support.launches import Launch

needs_hosts = pytest.mark.skipif(bool(missing()), reason=missing())
ROOT = Path(__file__).parents[2]


class Pair:
    """h1 and h2, and a Python for them that may be another on h2."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.file = hosts.write(folder / "hosts", "h1 slots=1", "h2 slots=1")
        self.options = ["-F", str(hosts.directory / "ssh_config")]
        self.python = folder / "python"
        self.only_on_h2("")

    def only_on_h2(self, lines: str) -> None:
        """Shell lines before Python starts there; `"$@"` are its arguments."""
        self.python.write_text(
            f"#!/bin/bash\nif ip -o -4 addr | grep -q ' {self.hosts.address('h2')}/'; then\n:\n{lines}\nfi\n"
            f'exec {sys.executable} "$@"\n'
        )
        self.python.chmod(0o755)

    def broken(self, *options: str, file: Path | None = None, trial: bool = False) -> list[Finding]:
        """What a preflight finds broken. trial: whether it is to come to the collectives"""
        hosts = read_hosts(file or self.file)
        found = preflight(hosts, str(self.shared), [*options, *self.options], str(self.python))
        tried = not any(one.topic == "collectives" and one.text.startswith("not tried") for one in found)
        assert tried == trial and not list(self.shared.iterdir()), "what was written is removed"
        assert all(one.fix for one in found if one.state == "broken")
        return [one for one in found if one.state == "broken"]


@pytest.fixture
def pair(hosts: Hosts, tmp_path: Path) -> Pair:
    return Pair(hosts, tmp_path)


def only(findings: list[Finding], topic: str, name: str, *words: str) -> None:
    assert [(one.topic, one.name) for one in findings] == [(topic, name)], findings
    assert all(word in findings[0].text for word in words), findings[0].text


@needs_hosts
def test_a_good_pair_passes(pair: Pair) -> None:
    """The one run of the command; with the collectives, under torchrun on both hosts."""
    command = [sys.executable, "-m", "real_megatron", "doctor", "--cluster", str(pair.file), "--json"]
    command += ["--shared", str(pair.shared)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SSH_OPTIONS": " ".join(pair.options)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)["findings"]
    per_host = ("ssh", "software", "shared files", "disk", "network", "clocks")
    assert {(one["topic"], one["name"]) for one in found} == {
        *((topic, name) for topic in per_host for name in ("h1", "h2")),
        ("ports", "h1"),
        ("GPUs", "all"),
        ("collectives", "all-reduce"),
        ("collectives", "broadcast"),
    }
    reduced = next(one["text"] for one in found if one["name"] == "all-reduce")
    assert "over 2 ranks, gloo" in reduced and "no figure for a CPU" in reduced
    networks = [one["text"] for one in found if one["topic"] == "network"]
    assert networks[1].startswith(f"eth0 ({pair.hosts.address('h2')}) for NCCL and gloo")


@pytest.fixture
def listener(pair: Pair) -> Iterator[int]:
    """A process that listens on the port where ranks meet, on h1, and on a server's port on h2."""
    code = "import socket, sys, time\nheld = [socket.create_server(('', int(p))) for p in sys.argv[1:]]\n"
    code += "print('up', flush=True)\ntime.sleep(100)"
    processes = []
    for name, port in (("h1", RENDEZVOUS_PORT), ("h2", SERVER_PORT)):
        command = [*pair.hosts.inside(name), sys.executable, "-c", code, str(port)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        assert processes[-1].stdout is not None and processes[-1].stdout.readline() == b"up\n"
    yield processes[0].pid
    for process in processes:
        process.kill()
        process.wait()


@needs_hosts
def test_ports_that_are_taken(pair: Pair, listener: int) -> None:
    only(pair.broken(), "ports", "h1", f"port {RENDEZVOUS_PORT} is in use by python", f"(process {listener})")
    file = pair.hosts.write(pair.folder / "serving", "h1 slots=1", "h2 slots=1 role=rollout")
    assert [one.name for one in pair.broken(file=file)] == ["h1", "h2"]
    assert f"port {SERVER_PORT}" in pair.broken(file=file)[1].text


@needs_hosts
def test_a_host_that_is_cut_off(pair: Pair) -> None:
    pair.hosts.cut("h2")
    try:
        found = pair.broken("-o", "ConnectTimeout=3")
    finally:
        pair.hosts.join("h2")
        pair.hosts.wait_reachable("h2")
    only(found, "ssh", "h2", "timed out")


@needs_hosts
def test_no_password_is_asked_for(pair: Pair) -> None:
    found = pair.broken("-o", "PubkeyAuthentication=no")
    assert [(one.topic, one.name) for one in found] == [("ssh", "h1"), ("ssh", "h2")]
    assert "Permission denied" in found[0].text and "ssh-copy-id h1" in found[0].fix


@needs_hosts
def test_a_python_that_is_not_there(pair: Pair) -> None:
    pair.only_on_h2("exec /nowhere/python")
    only(pair.broken(), "ssh", "h2", "its Python has ended with status 127", "/nowhere/python")


@needs_hosts
def test_another_version_and_another_commit(pair: Pair) -> None:
    shim = pair.folder / "shim"
    (shim / "torch-2.12.0.dist-info").mkdir(parents=True)
    (shim / "torch-2.12.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    pair.only_on_h2(f"export PYTHONPATH={shim}")
    only(pair.broken(), "software", "h2", "torch 2.12.0, and h1 2.13.0")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-C", str(shim)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another"], check=True)
    pair.only_on_h2(f"export GIT_DIR={shim}/.git")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    only(pair.broken(), "software", "h2", f"commit {head[:12]}, and h1 ")


@needs_hosts
def test_a_directory_that_is_not_shared(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEN_S", 0.5)
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", str(pair.shared)]).returncode:
        pytest.skip("mounts are refused")
    mount = f'exec unshare -m bash -c \'mount -t tmpfs none {pair.shared} && exec {sys.executable} "$@"\' python "$@"'
    pair.only_on_h2(mount)
    only(pair.broken(), "shared files", "h2", f"{pair.shared} is not that of h1")
    pair.only_on_h2("")
    pair.shared.rmdir()
    pair.shared = Path("/proc/sys")
    found = preflight(read_hosts(pair.file), "/proc/sys", pair.options, str(pair.python))
    lost = [one for one in found if one.topic == "shared files"]
    assert [one.state for one in lost] == ["broken", "broken"] and "cannot write to /proc/sys" in lost[0].text


@needs_hosts
def test_a_clock_that_is_wrong(pair: Pair) -> None:
    (pair.folder / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 90\n")
    pair.only_on_h2(f"export PYTHONPATH={pair.folder}")
    only(pair.broken(), "clocks", "h2", "+90.0")


@needs_hosts
def test_an_address_that_the_host_does_not_have(pair: Pair) -> None:
    other = pair.hosts.address("h2").rpartition(".")[0] + ".77"
    pair.file.write_text(f"h1 slots=1 address={pair.hosts.address('h1')}\nh2 slots=1 address={other}\n")
    only(pair.broken(), "network", "h2", f"no interface holds {other}: eth0 {pair.hosts.address('h2')}")


@needs_hosts
def test_ranks_that_do_not_meet(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIAL_S", 3)
    pair.only_on_h2('[ "$2" != torch.distributed.run ] || { echo RuntimeError: no route; exit 3; }')
    first, second = pair.broken(trial=True)
    assert (first.topic, first.name) == ("collectives", "h1") and "not done in 3 s" in first.text
    assert second.name == "h2" and "exit status 3; RuntimeError: no route" in second.text
    for name in ("h1", "h2"):
        assert not pair.hosts.processes(name), "nothing is left"


def test_options_of_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_OPTIONS", "-F 'a file' -o ConnectTimeout=3")
    command = ssh_command(Host("node", 8, port=2022, user="me"), ["-v"])
    assert command[:5] == ["ssh", "-o", "ControlMaster=no", "-o", "ControlPath=none"], "the first of two values wins"
    assert command[5:12] == ["-v", "-F", "a file", "-o", "ConnectTimeout=3", "-o", "BatchMode=yes"]
    assert "ConnectTimeout=10" in command and "ServerAliveInterval=5" in command
    assert command[-5:] == ["-p", "2022", "-l", "me", "node"]
    monkeypatch.setenv("SSH_OPTIONS", "-F 'a file")
    with pytest.raises(ConfigError, match="SSH_OPTIONS in the environment: No closing quotation; write it"):
        ssh_command(Host("node", 8), [])


def test_a_port_of_this_machine_that_is_taken() -> None:
    from real_megatron.cluster.host_side import taken

    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert list(taken("127.0.0.1", [port])) == [str(port)]
    assert taken("127.0.0.1", [port]) == {} and taken("192.0.2.77", [port]) == {}, "the latter is no port's fault"


@needs_hosts
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_nothing_is_left_when_the_launcher_ends_while_ranks_try(
    pair: Pair, tmp_path: Path, number: int, status: int
) -> None:
    """The end of ssh.sh alone, which nobody tells the preflight or the hosts."""
    config = RunConfig.model_validate({"output": str(pair.shared), "model": {"path": "nowhere"}})
    with Launch(pair.hosts, pair.file, config, tmp_path) as launch:
        launch.until(lambda: all("cluster.trial" in " ".join(launch.hosts.processes(h).values()) for h in ("h1", "h2")))
        os.kill(launch.process.pid, number)
        assert launch.process.wait(30) == status, launch.text()
        launch.nothing_left_within(30)


@pytest.mark.parametrize("silent", [False, True])
def test_a_host_ends_what_it_has_started_when_nobody_is_there(silent: bool, tmp_path: Path) -> None:
    code = f"from real_megatron.cluster import host_side as h; h.SILENCE_S = {1 if silent else 100}; h.main()"
    # One process in the group of the command, one in a session of its own, as torchrun's ranks.
    question = {"ask": "run", "environment": {}, "unless_set": {}, "limit_s": 100}
    question["command"] = ["sh", "-c", f"setsid sleep 100 & echo $! $$ >{tmp_path}/pids; wait"]
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        while not (tmp_path / "pids").exists() or not (pids := (tmp_path / "pids").read_text().split()):
            time.sleep(0.02)
        if not silent:
            process.stdin.close()
        assert process.wait(30) == 0
    assert not [pid for pid in pids if psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).status() != "zombie"]


def test_what_a_host_has_set_stays_unless_the_launcher_hands_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from real_megatron.cluster.host_side import run

    monkeypatch.setenv("A", "of the host")
    monkeypatch.setenv("B", "of the host")
    monkeypatch.delenv("C", raising=False)
    command = [sys.executable, "-c", "import os; print(*(os.environ[name] for name in 'ABC'), sep=', ')"]
    found = run(command, {"B": "handed on"}, dict.fromkeys("ABC", "found"), 60)
    assert found == {"status": 0, "output": "of the host, handed on, found\n"}

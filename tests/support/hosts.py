"""Several hosts on one machine: a network namespace each, joined by a bridge, with an ssh server in each.

They share the machine's files, process ids and name; only the network is theirs. The machine itself reaches them all,
so that a launcher runs outside of them. Needs root, sshd and ip (tests/run.sh --hosts).
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
IP = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
PORT = 2222
_numbers = itertools.count()


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if SSHD is None or IP is None or shutil.which("ssh") is None:
        return "sshd, ssh or ip is not installed (tests/run.sh --hosts)"
    if os.geteuid():
        return "network namespaces need root"
    probe = f"real-probe-{os.getpid()}"
    made = subprocess.run([IP, "netns", "add", probe], capture_output=True, text=True)
    refused = made.returncode != 0
    if not refused:
        bridge = f"rp{os.getpid()}"
        made = subprocess.run([IP, "link", "add", bridge, "type", "bridge"], capture_output=True, text=True)
        refused = made.returncode != 0
        subprocess.run([IP, "link", "del", bridge], capture_output=True)
    subprocess.run([IP, "netns", "del", probe], capture_output=True)
    return f"network namespaces are refused: {made.stderr.strip()}" if refused else ""


class Hosts:
    """`count` hosts h1, h2, …; a context manager, which removes them, and every process in them, at its end.

    directory: for keys, ssh's configuration and the logs of the servers
    """

    def __init__(self, count: int, directory: Path) -> None:
        self.names = [f"h{i + 1}" for i in range(count)]
        self.directory = directory
        self.ssh = ["ssh", "-F", str(directory / "ssh_config")]
        """The command that reaches them by name: with keys and known hosts of their own."""
        self._id = f"{os.getpid()}x{next(_numbers)}"
        self._bridge = f"b{self._id}"
        self._net = ""
        self._servers: list[subprocess.Popen[bytes]] = []

    def namespace(self, host: str) -> str:
        return f"real-{self._id}-{host}"

    def address(self, host: str) -> str:
        return f"{self._net}.{self.names.index(host) + 1}"

    @property
    def gateway(self) -> str:
        """The address of the machine itself, where a launcher runs."""
        return f"{self._net}.254"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for key in ("host_key", "user_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(self.directory / key)],
                check=True,
                stdin=subprocess.DEVNULL,
            )
        self._net = _free_net()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in self.names:
            namespace, inside = self.namespace(host), f"{self._port(host)}i"
            _ip("netns", "add", namespace)
            _ip("link", "add", self._port(host), "type", "veth", "peer", "name", inside)
            _ip("link", "set", self._port(host), "master", self._bridge)
            _ip("link", "set", self._port(host), "up")
            _ip("link", "set", inside, "netns", namespace, "name", "eth0")
            _ip("-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        self._start_servers()

    def _start_servers(self) -> None:
        Path("/run/sshd").mkdir(exist_ok=True)
        public = (self.directory / "host_key.pub").read_text()
        known = "".join(f"[{self.address(host)}]:{PORT} {public}" for host in self.names)
        (self.directory / "known_hosts").write_text(known)
        (self.directory / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {self.directory}/host_key\nAuthorizedKeysFile {self.directory}/user_key.pub\n"
            "StrictModes no\nPermitRootLogin yes\nUsePAM no\nPidFile none\nUseDNS no\nMaxStartups 100\n"
        )
        # Nothing of ~/.ssh is read, since -F is given, or written.
        (self.directory / "ssh_config").write_text(
            "".join(f"Host {host}\n  HostName {self.address(host)}\n  Port {PORT}\n" for host in self.names)
            + f"Host *\n  User root\n  IdentityFile {self.directory}/user_key\n  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.directory}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n  BatchMode yes\n  ConnectTimeout 5\n  LogLevel ERROR\n"
        )
        assert SSHD is not None
        for host in self.names:
            # The kernel ends a server with this process, however that ends.
            command = ["setpriv", "--pdeathsig", "KILL", *self.inside(host), SSHD, "-D"]
            command += ["-f", str(self.directory / "sshd_config"), "-E", str(self.directory / f"sshd_{host}.log")]
            self._servers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        for host in self.names:
            self.wait_reachable(host)

    def wait_reachable(self, host: str, limit_s: float = 30) -> None:
        """Wait until ssh reaches a host."""
        deadline = time.monotonic() + limit_s
        while (tried := subprocess.run([*self.ssh, host, "true"], capture_output=True, text=True)).returncode:
            if time.monotonic() > deadline:
                log = self.directory / f"sshd_{host}.log"
                raise AssertionError(
                    f"{host} cannot be reached: {tried.stderr}{log.read_text() if log.exists() else ''}"
                )
            time.sleep(0.1)

    def inside(self, host: str) -> list[str]:
        """What to put in front of a command to run it on a host, without ssh."""
        assert IP is not None
        return [IP, "netns", "exec", self.namespace(host)]

    def cut(self, host: str) -> None:
        """Pull a host's cable: packets are lost without a word, its processes run on."""
        _ip("link", "set", self._port(host), "down")

    def join(self, host: str) -> None:
        """Plug it in again."""
        _ip("link", "set", self._port(host), "up")

    def processes(self, host: str) -> dict[int, str]:
        """The processes on a host but those of its ssh server: id → command line."""
        servers = {server.pid for server in self._servers}
        found = {}
        for pid in self._pids(host):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                # An empty one is a zombie's. A session of the server outlives a cable that is pulled.
                if pid not in servers and command and not command.startswith(b"sshd: "):
                    found[pid] = command.decode(errors="replace").strip()
        return found

    def write(self, path: Path, *lines: str) -> Path:
        """A host file: each line is `NAME settings`, to which the host's address is added."""
        text = "".join(f"{line} address={self.address(line.split()[0])}\n" for line in lines)
        path.write_text(text)
        return path

    def _pids(self, host: str) -> list[int]:
        assert IP is not None
        listed = subprocess.run([IP, "netns", "pids", self.namespace(host)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def _port(self, host: str) -> str:
        """Name of the bridge's end of a host's cable: an interface's name has at most 15 characters."""
        return f"{self._id}{host}"

    def __exit__(self, *_: object) -> None:
        assert IP is not None
        deadline = time.monotonic() + 10
        while (left := [pid for host in self.names for pid in self._pids(host)]) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        for server in self._servers:
            server.wait()
        for host in self.names:
            subprocess.run([IP, "link", "del", self._port(host)], capture_output=True)
            subprocess.run([IP, "netns", "del", self.namespace(host)], capture_output=True)
        subprocess.run([IP, "link", "del", self._bridge], capture_output=True)


def _ip(*arguments: str) -> None:
    assert IP is not None
    done = subprocess.run([IP, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _free_net() -> str:
    """The first three bytes of a private network of which this machine has no address."""
    assert IP is not None
    used = subprocess.run([IP, "-o", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    nets = [net for net in (f"10.77.{i}" for i in range(256)) if f" {net}." not in used]
    return random.choice(nets)

"""`real-megatron doctor --cluster HOSTFILE`: whether hosts can run a launch together, before one waits for another."""

import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from real_megatron.cluster import checks
from real_megatron.cluster.checks import MARK, Offset
from real_megatron.cluster.hostfile import Host, with_addresses
from real_megatron.cluster.node import NETWORK_VARIABLES, RENDEZVOUS_PORT, torchrun
from real_megatron.cluster.ssh import Conversation, HostError
from real_megatron.doctor.finding import Finding
from real_megatron.doctor.machine import interface_of
from real_megatron.rollout.rollout_hosts import ROUTER_PORT, SERVER_PORT

SEEN_S = 10
"""How long a file that another host has written may take to be seen: network file systems keep what they know of a
directory for some seconds."""
TRIAL_S = 300
ROOT = Path(__file__).parents[2]


def preflight(
    hosts: Sequence[Host],
    shared: str,
    ssh_options: Sequence[str] = (),
    python: str = sys.executable,
    rendezvous_port: int = RENDEZVOUS_PORT,
) -> list[Finding]:
    """Everything that is checked, hosts in parallel. Raises ConfigError for a host whose address is not known.

    shared: a directory that all hosts are to share, such as the run's output
    ssh_options: of ssh, before those of the environment variable SSH_OPTIONS
    python: the path of the trainer's Python on all hosts
    """
    addresses = dict(zip((host.name for host in hosts), with_addresses(hosts), strict=True))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(max(4, len(hosts))))
        look = _Preflight(hosts, addresses, shared, python, rendezvous_port, pool)
        look.connect(stack, ssh_options)
        found = [*look.reached, *look.compare()]
        if any(one.state == "broken" for one in found):
            found.append(Finding("collectives", "all", "note", "not tried: mend the above first"))
        else:
            found += look.collectives()
    return found


class _Preflight:
    """One preflight: the conversations with the hosts that answer."""

    def __init__(
        self,
        hosts: Sequence[Host],
        addresses: Mapping[str, str],
        shared: str,
        python: str,
        port: int,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.hosts, self.addresses, self.shared, self.python, self.port = hosts, addresses, shared, python, port
        self.reached: list[Finding] = []
        self._pool = pool
        self._talk: dict[str, Conversation] = {}

    def connect(self, stack: ExitStack, options: Sequence[str]) -> None:
        """Start the other side on every host; `reached` says where it did."""
        remote = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(self.python)} -m real_megatron.cluster.host_side"

        def start(host: Host) -> Conversation | str:
            try:
                return Conversation(host, options, remote)
            except HostError as error:
                return str(error)

        for host, talk in zip(self.hosts, self._pool.map(start, self.hosts), strict=True):
            if isinstance(talk, str):
                fix = (
                    f"`ssh {host.name} {self.python} --version` must work without a password (ssh-copy-id {host.name})"
                )
                self.reached.append(Finding("ssh", host.name, "broken", talk, fix))
            else:
                stack.callback(talk.close)
                self._talk[host.name] = talk
                self.reached.append(Finding("ssh", host.name, "ok", f"reached, at {self.addresses[host.name]}"))

    def compare(self) -> Iterator[Finding]:
        """The findings on the hosts that answer."""
        hosts = [host for host in self.hosts if host.name in self._talk]
        if not hosts:
            return
        facts, failed = self._ask_all("facts", {name: {} for name in self._talk})
        for name, reason in failed.items():
            yield Finding("software", name, "broken", f"does not tell: {reason}")
        self._facts = facts
        hosts = [host for host in hosts if host.name in facts]
        if not hosts:
            return
        yield from checks.software(facts)
        yield from self._shared_files()
        yield from self._ports(hosts)
        yield from checks.gpus(hosts, facts)
        yield from checks.network(self.addresses, facts)
        for host in hosts:
            yield checks.clock(host.name, self._offset(self._talk[host.name]))

    def collectives(self) -> Iterator[Finding]:
        """An all-reduce and a broadcast over all training ranks, under torchrun."""
        hosts = [host for host in self.hosts if host.role == "train"]
        facts = self._facts
        on_gpu = all(facts[host.name]["gpus"] for host in hosts)
        addresses = [self.addresses[host.name] for host in hosts]

        def launch(item: tuple[int, Host]) -> dict[str, Any]:
            index, host = item
            interface = interface_of(self.addresses[host.name], facts[host.name]["interfaces"])
            command = torchrun(self.python, hosts, addresses, index, "preflight", self.port)
            command += ["-m", "real_megatron.cluster.trial"]
            # What ssh.sh hands on to the hosts, so that the trial takes the network that the run will take.
            environment = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "GLOO_"))}
            unless_set = dict.fromkeys(NETWORK_VARIABLES, interface)
            if not on_gpu:
                environment["OMP_NUM_THREADS"] = "1"
            arguments = {"command": command, "environment": environment, "unless_set": unless_set, "limit_s": TRIAL_S}
            try:
                done: dict[str, Any] = self._talk[host.name].ask("run", TRIAL_S + 30, **arguments)
            except HostError as error:
                return {"status": None, "output": str(error)}
            return done

        done = dict(zip((host.name for host in hosts), self._pool.map(launch, enumerate(hosts)), strict=True))
        lines = [line for one in done.values() for line in one["output"].splitlines() if line.startswith(MARK)]
        if lines and not any(one["status"] for one in done.values()):
            yield from checks.collectives(json.loads(lines[0].removeprefix(MARK)), hosts[0].slots)
            return
        for name, one in done.items():
            if one["status"] != 0:
                status = f"not done in {TRIAL_S} s" if one["status"] is None else f"exit status {one['status']}"
                text = f"the trial under torchrun failed: {status}; {_last_error(one['output'])}"
                fix = "do firewalls let training hosts reach each other at every port?"
                yield Finding("collectives", name, "broken", text, fix)

    def _shared_files(self) -> Iterator[Finding]:
        token = f".real-megatron-{secrets.token_hex(6)}"
        names = {name: f"{token}-{name}" for name in self._talk}
        try:
            free, failed = self._ask_all("write", {n: {"directory": self.shared, "name": f} for n, f in names.items()})
            written = [names[name] for name in free]
            seen, deaf = self._ask_all(
                "unseen", {n: {"directory": self.shared, "names": written, "wait_s": SEEN_S} for n in free}
            )
            owners = {file: name for name, file in names.items()}
            unseen = {name: [owners[file] for file in files] for name, files in seen.items()}
            yield from checks.shared_files(self.shared, unseen, failed | deaf)
            yield from (checks.disk(name, self.shared, bytes) for name, bytes in free.items())
        finally:
            self._ask_all("remove", {name: {"directory": self.shared, "name": file} for name, file in names.items()})

    def _ports(self, hosts: Sequence[Host]) -> Iterator[Finding]:
        meeting = next(host.name for host in self.hosts if host.role == "train")
        routing = next((host.name for host in self.hosts if host.role == "rollout" and host.router != "off"), "")
        asked: dict[str, list[int]] = {}
        for host in hosts:
            servers = range(SERVER_PORT, SERVER_PORT + host.slots) if host.role == "rollout" else ()
            own = [self.port] if host.name == meeting else [ROUTER_PORT] if host.name == routing else []
            asked[host.name] = [*own, *servers]
        asked = {name: numbers for name, numbers in asked.items() if numbers}
        taken, failed = self._ask_all(
            "taken", {n: {"address": self.addresses[n], "ports": p} for n, p in asked.items()}
        )
        for name, numbers in asked.items():
            if name in failed:
                yield Finding("ports", name, "broken", f"does not tell: {failed[name]}")
            else:
                yield from checks.ports(name, numbers, taken[name])

    @staticmethod
    def _offset(talk: Conversation) -> Offset:
        """The best of some exchanges: the quicker the answer, the closer the bound."""
        best = Offset(0.0, float("inf"))
        for _ in range(5):
            sent, begin = time.time(), time.monotonic()
            theirs = talk.ask("clock")
            trip = time.monotonic() - begin
            if trip / 2 < best.bound:
                best = Offset(theirs - sent - trip / 2, trip / 2)
        return best

    def _ask_all(self, what: str, arguments: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, str]]:
        """Answers, and why there is none, by host. arguments: of the hosts that are asked"""

        def ask(name: str) -> tuple[bool, Any]:
            try:
                return True, self._talk[name].ask(what, **arguments[name])
            except HostError as error:
                return False, str(error)

        told = dict(zip(arguments, self._pool.map(ask, arguments), strict=True))
        return {n: a for n, (well, a) in told.items() if well}, {n: a for n, (well, a) in told.items() if not well}


def _last_error(output: str) -> str:
    """The last line that names an error; torchrun's summary comes after those of ranks."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or lines or ["no output"])[-1]

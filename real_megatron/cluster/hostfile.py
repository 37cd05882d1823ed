"""The hosts of a run as a file, one a line: `HOST slots=8 [role=train|rollout] [address=IP] [port=22] [user=NAME]
[router=on|off]`.

HOST is what ssh is given, a name of its configuration file included. `#` begins a comment.

`python -m real_megatron.cluster.hostfile FILE` prints the hosts for scripts, one a line: HOST, slots, role, address,
port and user, with one space between, `-` for a port or user that is not given.
"""

import difflib
import ipaddress
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from real_megatron.errors import ConfigError, UserError

ROLES = ("train", "rollout")
"""A host's ranks train, or its GPUs serve rollouts."""
ROUTER = ("on", "off")
"""Whether a router stands in front of the servers."""
_KEYS = ("slots", "role", "address", "port", "user", "router")
# Neither reads as an option of ssh, nor has a character that a shell or a URL would take for its own.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Host:
    """A line of a host file."""

    name: str
    """What ssh is given."""
    slots: int
    """GPUs, or ranks where there is none: one rank a slot of a training host; servers share those of a rollout host."""
    role: str = "train"
    """Of `ROLES`."""
    address: str = ""
    """IPv4 address at which the other hosts reach it; empty: that of `name`."""
    port: int | None = None
    """Of its ssh server; None: as ssh is configured."""
    user: str = ""
    """To log in as; empty: as ssh is configured."""
    router: str = ""
    """Of `ROUTER`, on the first rollout host; empty: where there are several servers and sglang-router is installed."""


def read_hosts(path: str | Path) -> list[Host]:
    """The hosts of a file, in its order. Raises ConfigError, naming file, line and the fix, for a file that cannot be
    read, a line that cannot be used, a host or address that stands there twice, and where no host trains."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the host file ({error})") from None
    hosts: list[Host] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}:{number}"
        host = _host(words, where)
        for name in filter(None, {host.name, host.address}):
            if name in seen:
                raise ConfigError(f"{where}: {name} stands there twice (first on line {seen[name]}): keep one line")
            seen[name] = number
        if host.router and (host.role != "rollout" or any(one.role == "rollout" for one in hosts)):
            raise ConfigError(
                f"{where}: router={host.router}: set it on the first host with role=rollout, and only there"
            )
        hosts.append(host)
    if not any(host.role == "train" for host in hosts):
        raise ConfigError(f"{path}: no training host: add a line such as `node1 slots=8`")
    return hosts


def _host(words: Sequence[str], where: str) -> Host:
    name, *settings = words
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: {name!r} is no name of a host: begin the line with one, as in `node1 slots=8`")
    values: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(_KEYS)}"
            raise ConfigError(f"{where}: unknown key `{key}`; {hint}")
        if not equals or not value:
            raise ConfigError(f"{where}: `{setting}` has no value: write it as {key}=VALUE, without spaces")
        if key in values:
            raise ConfigError(f"{where}: `{key}` is set twice: keep one")
        values[key] = value
    if "slots" not in values:
        raise ConfigError(f"{where}: {name} has no slots: add slots=N, the number of its GPUs")
    role, address, user = values.get("role", "train"), values.get("address", ""), values.get("user", "")
    if role not in ROLES:
        close = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"use one of {', '.join(ROLES)}"
        raise ConfigError(f"{where}: role={role}: there is no such role; {hint}")
    if address and not _is_ipv4(address):
        raise ConfigError(f"{where}: address={address}: name an IPv4 address, such as 10.0.0.1")
    if user and not _NAME.fullmatch(user):
        raise ConfigError(f"{where}: user={user}: is no name of a user")
    router = values.get("router", "")
    if router and router not in ROUTER:
        raise ConfigError(f"{where}: router={router}: use one of {', '.join(ROUTER)}")
    port = _number(values["port"], "port", where, 65535) if "port" in values else None
    return Host(name, _number(values["slots"], "slots", where), role, address, port, user, router)


def _number(text: str, key: str, where: str, most: int | None = None) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= (most or int(text)):
        raise ConfigError(
            f"{where}: {key}={text}: must be a whole number of at least 1{f', at most {most}' * bool(most)}"
        )
    return int(text)


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def with_addresses(hosts: Sequence[Host]) -> list[str]:
    """Per host the IPv4 address at which the others reach it: the one given, else that of its name.

    Raises ConfigError for a name without one, and for one of this machine alone (127.0.0.1) where there are several.
    """
    addresses = []
    for host in hosts:
        address = host.address
        if not address:
            try:
                address = socket.gethostbyname(host.name)
            except OSError as error:
                raise ConfigError(
                    f"{host.name}: its address is not known ({error}): add address=IP to its line of the host file"
                ) from None
        if len(hosts) > 1 and ipaddress.IPv4Address(address).is_loopback:
            raise ConfigError(
                f"{host.name}: its address is {address}, at which no other host reaches it: add address=IP to its line "
                "of the host file"
            )
        addresses.append(address)
    return addresses


def main(arguments: Sequence[str]) -> int:
    """Print the hosts of a file for scripts; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m real_megatron.cluster.hostfile FILE", file=sys.stderr)
        return 2
    try:
        hosts = read_hosts(arguments[0])
        addresses = with_addresses(hosts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for host, address in zip(hosts, addresses, strict=True):
        print(host.name, host.slots, host.role, address, host.port or "-", host.user or "-")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

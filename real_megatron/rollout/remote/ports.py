"""Ports on which servers listen."""

import errno
import itertools
import random
import socket
from pathlib import Path

LOCAL = "127.0.0.1"
"""Where local servers listen."""
_FIRST = 10000
"""Lower ports belong to well-known services."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that are free now; fewer than `count` where there are not so many.

    None that the kernel gives to outgoing connections, as long as there are others: a server listens minutes later,
    when it has loaded its model, and a connection of any process could have taken such a port by then.
    """
    first, last = connection_ports()
    ports = list(range(_FIRST, 2**16))
    # Not from the generator that a run seeds.
    random.SystemRandom().shuffle(ports)
    ports.sort(key=lambda port: first <= port <= last)
    return list(itertools.islice((port for port in ports if not in_use(port)), count))


def connection_ports() -> tuple[int, int]:
    """The first and the last port that the kernel gives to outgoing connections."""
    try:
        first, last = map(int, _RANGE.read_text(encoding="ascii").split())
    except OSError:  # not Linux
        return 32768, 65535
    return first, last


def in_use(port: int, host: str = LOCAL) -> bool:
    """Whether a server could not listen on this port of an address of this machine now. Raises OSError for an address
    that is none of its own, or where it may not listen."""
    with socket.socket() as probe:
        # As servers do: connections of one that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return True
    return False

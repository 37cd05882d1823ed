"""Which ports local servers get."""

import random
import socket

from real_megatron.rollout.remote import ports
from real_megatron.rollout.remote.ports import LOCAL, connection_ports, free_ports, in_use


def test_ports_are_different_and_no_connection_can_take_one():
    """While a server loads its model, every process of the machine makes connections."""
    found = free_ports(200)
    first, last = connection_ports()
    assert len(set(found)) == 200
    assert not [port for port in found if first <= port <= last]


def test_a_port_in_use_is_not_chosen(monkeypatch):
    (port,) = free_ports(1)
    with socket.socket() as listening:
        listening.bind((LOCAL, port))
        listening.listen()
        assert in_use(port)
        monkeypatch.setattr(ports.random.SystemRandom, "shuffle", lambda self, among: among.insert(0, port))
        assert port not in free_ports(3)


def test_a_kernel_that_gives_all_ports_to_connections_leaves_some(monkeypatch):
    monkeypatch.setattr(ports, "connection_ports", lambda: (1024, 65535))
    assert len(free_ports(4)) == 4


def test_the_random_state_of_a_run_stays():
    before = random.getstate()
    free_ports(2)
    assert random.getstate() == before

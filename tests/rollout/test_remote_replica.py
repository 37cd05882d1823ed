"""Which server gets a request, and when one is given up. Servers are not asked: probes and restores are prepared."""

import asyncio

import pytest

from real_megatron.errors import EngineError
from real_megatron.rollout.remote import replica as replica_module
from real_megatron.rollout.remote.errors import Unreachable
from real_megatron.rollout.remote.replica import Replica, ReplicaPool


class Servers:
    """A pool of attached servers whose health checks and restores fail as often as said."""

    def __init__(self, count: int, concurrency: int = 8, restarts: int = 0, unhealthy: int = 0) -> None:
        self.replicas = [Replica(f"http://server{i}") for i in range(count)]
        self.unhealthy, self.asked = unhealthy, 0
        self.pool = ReplicaPool(
            self.replicas,
            concurrency=concurrency,
            start_timeout_s=0,
            restarts=restarts,
            port_taken=lambda port: "",
            probe=self.probe,
            restore=self.restore,
        )

    async def probe(self, replica: Replica, timeout_s: float) -> None:
        self.asked += 1
        if self.asked <= self.unhealthy:
            raise Unreachable("no answer")

    async def restore(self, replica: Replica) -> None:
        replica.label = "run-1"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(replica_module, "_POLL_S", 0)


def test_requests_go_to_the_least_loaded_server_though_others_have_room():
    async def main() -> None:
        servers = Servers(3)
        await servers.pool.start()
        taken = [await servers.pool.acquire() for _ in range(6)]
        assert [replica.in_flight for replica in servers.replicas] == [2, 2, 2]
        servers.pool.release(taken[1])
        servers.pool.release(taken[4])
        assert await servers.pool.acquire() is servers.replicas[1]

    asyncio.run(main())


def test_a_request_waits_where_all_servers_are_full():
    async def main() -> None:
        servers = Servers(2, concurrency=1)
        await servers.pool.start()
        first, second = await servers.pool.acquire(), await servers.pool.acquire()
        assert first is not second
        waiting = asyncio.create_task(servers.pool.acquire())
        await asyncio.sleep(0)
        assert not waiting.done()
        servers.pool.release(second)
        assert await waiting is second

    asyncio.run(main())


@pytest.mark.parametrize(
    ("restarts", "unhealthy", "served"), [(0, 0, True), (0, 1, False), (2, 2, True), (2, 3, False)]
)
def test_a_server_is_given_up_after_so_many_failures_in_a_row(restarts: int, unhealthy: int, served: bool):
    async def main() -> None:
        servers = Servers(1, restarts=restarts, unhealthy=unhealthy)
        if served:
            await servers.pool.start()
            assert (servers.replicas[0].state, servers.replicas[0].label) == ("ready", "run-1")
            return
        with pytest.raises(
            EngineError, match=f"server0 is dead .given up after {restarts} recoveries in a row: .*no an"
        ):
            await servers.pool.start()
        with pytest.raises(EngineError, match="no rollout server can serve: http://server0 is dead"):
            await servers.pool.acquire()

    asyncio.run(main())

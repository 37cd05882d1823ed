"""The pauses between attempts, and whom a failure is held against.

Everything else of the client is tested through the engines (test_remote_engine.py).
"""

import asyncio

import pytest

from real_megatron.errors import EngineError
from real_megatron.rollout.remote.client import RequestClient
from real_megatron.rollout.remote.errors import Retryable, Unreachable
from real_megatron.rollout.remote.http import Reply
from real_megatron.rollout.remote.replica import Replica

ATTEMPTS = 9


class DeafServer:
    """Stands for the pool and for HTTP: one replica, which never answers."""

    def __init__(self, replaced: int = 0) -> None:
        """replaced: how often the server has been recovered when a request to it fails"""
        self.replica = Replica("http://127.0.0.1:1")
        self.replaced = replaced
        self.suspected = 0

    async def acquire(self) -> Replica:
        return self.replica

    def release(self, replica: Replica) -> None: ...

    def recover(self, replica: Replica, reason: str) -> None:
        self.suspected += 1

    async def post(self, url: str, body: dict, timeout_s: float):
        self.replica.recoveries += self.replaced
        raise Unreachable("no reply")


class GoodServer(DeafServer):
    """Answers every request."""

    async def post(self, url: str, body: dict, timeout_s: float):
        return Reply(200, b'{"text": "good"}')


def pauses_of_one_request(monkeypatch, deaf: DeafServer) -> list[float]:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    client = RequestClient(deaf, deaf, timeout_s=1, attempts=ATTEMPTS, router=None, confirm=None)
    with pytest.raises(EngineError, match=f"failed {ATTEMPTS} times"):
        asyncio.run(client.request("it", "/generate", {}, lambda reply, replica: reply))
    return pauses


def test_pauses_double_up_to_ten_seconds_and_differ_between_requests(monkeypatch):
    """Jitter of half the pause each way: clients that lost one server at the same time do not return together."""
    runs = [pauses_of_one_request(monkeypatch, DeafServer()) for _ in range(20)]
    for attempt, nominal in enumerate((0.25, 0.5, 1, 2, 4, 8, 10, 10)):
        pauses = [run[attempt] for run in runs]
        assert all(0.5 * nominal <= pause <= 1.5 * nominal for pause in pauses)
        assert max(pauses) - min(pauses) > 0.2 * nominal


@pytest.mark.parametrize(("replaced", "suspected"), [(0, ATTEMPTS), (1, 0)])
def test_what_an_earlier_server_failed_at_is_not_held_against_its_successor(monkeypatch, replaced, suspected):
    """As after a kill with many requests in flight, some of which fail late."""
    deaf = DeafServer(replaced)
    pauses_of_one_request(monkeypatch, deaf)
    assert deaf.suspected == suspected


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_good_reply_forgets_earlier_failures(monkeypatch, confirmed):
    """Else a server that was restarted now and then over a long run, with good work between, would be given up."""
    good = GoodServer()
    good.replica.failures_in_a_row = 2

    async def confirm(replica: Replica) -> None:
        if not confirmed:
            raise Retryable("from other weights")

    client = RequestClient(good, good, timeout_s=1, attempts=1, router=None, confirm=confirm)
    request = client.request("it", "/generate", {}, lambda reply, replica: reply)
    if confirmed:
        assert asyncio.run(request) == {"text": "good"} and good.replica.failures_in_a_row == 0
        return
    with pytest.raises(EngineError, match="it failed 1 times: .*from other weights"):
        asyncio.run(request)
    assert good.replica.failures_in_a_row == 2

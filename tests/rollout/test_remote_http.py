"""HTTP to rollout servers against local ones: connections kept and let go, deadlines, one error for every loss."""

import asyncio
import gc
import json
from pathlib import Path

import pytest

from real_megatron.rollout.remote import http
from real_megatron.rollout.remote.errors import Unreachable
from real_megatron.rollout.remote.http import Http, Reply
from real_megatron.rollout.remote.ports import free_ports

BODY = {"input_ids": [1, 2], "sampling_params": {"n": 1, "max_new_tokens": 4}}


def with_http(use):
    """Run `use(http)` in an event loop."""

    async def main():
        client = Http()
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(main())


def test_replies_come_with_status_and_json(servers):
    (fake,) = servers(1)
    fake.faults = ["refuse_400"]

    async def use(client):
        refused = await client.post(fake.url + "/generate", BODY, 10)
        good = await client.post(fake.url + "/generate", BODY, 10)
        return refused, good, await client.get(fake.url + "/model_info", 10)

    refused, good, info = with_http(use)
    assert refused.status == 400 and "context" in refused.text
    assert good.status == 200 and len(good.json()["output_ids"]) == 4
    assert info.json()["weight_version"] == fake.version


@pytest.mark.parametrize("body", [b"", b"[1", b"[NaN]", b"[-Infinity]", b'"\xff"', b"[" * 100_000])
def test_a_body_that_is_not_json_is_a_value_error(body):
    with pytest.raises(ValueError):
        Reply(200, body).json()


def test_reading_a_reply_collects_no_garbage_and_leaves_collection_as_it_was():
    body = json.dumps([[0.5, token, None] for token in range(5000)]).encode()
    for collecting in (False, True):
        (gc.enable if collecting else gc.disable)()
        try:
            gc.collect()
            before = [one["collections"] for one in gc.get_stats()]
            tree = Reply(200, body).json()
            assert [one["collections"] for one in gc.get_stats()] == before and len(tree) == 5000
            assert gc.isenabled() is collecting
        finally:
            gc.enable()


def test_numbers_of_a_reply_are_those_that_json_reads():
    recorded = Path(__file__).with_name("recorded_sglang.json").read_bytes()
    assert Reply(200, recorded).json() == json.loads(recorded)


def test_connections_are_kept_between_requests(servers):
    (fake,) = servers(1)
    seen = []

    async def use(client):
        for _ in range(2):
            await client.post(fake.url + "/generate", BODY, 10)
            seen.append(set(fake.connections))

    with_http(use)
    assert len(seen[0]) == 1 and seen[1] == seen[0]


def test_idle_connections_are_let_go_before_the_server_closes_them(servers, monkeypatch):
    """A request on a connection that the server is just closing would be lost: uvicorn does so after 5 s."""
    assert http._KEEPALIVE_S < 5
    monkeypatch.setattr(http, "_KEEPALIVE_S", 0.05)
    (fake,) = servers(1)

    async def use(client):
        assert client._session.connector._keepalive_timeout == 0.05
        await client.post(fake.url + "/generate", BODY, 10)
        async with asyncio.timeout(60):
            while fake.connections:
                await asyncio.sleep(0.01)
        return await client.post(fake.url + "/generate", BODY, 10)

    assert with_http(use).status == 200


@pytest.mark.parametrize(
    ("fault", "message"), [("hang", "no reply within 0.3 s"), ("disconnect", "ServerDisconnectedError")]
)
def test_a_reply_that_never_comes_is_unreachable(servers, fault, message):
    (fake,) = servers(1)
    fake.faults = [fault]
    with pytest.raises(Unreachable, match=message):
        with_http(lambda client: client.post(fake.url + "/generate", BODY, 0.3 if fault == "hang" else 10))


def test_a_closed_port_is_unreachable():
    (port,) = free_ports(1)
    with pytest.raises(Unreachable, match="ClientConnectorError"):
        with_http(lambda client: client.get(f"http://127.0.0.1:{port}/health", 10))


def test_a_reply_cut_short_is_unreachable():
    """The connection ends before the announced length."""

    async def main():
        async def cut(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
            writer.close()

        server = await asyncio.start_server(cut, "127.0.0.1", 0)
        client = Http()
        try:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(Unreachable, match="ClientPayloadError"):
                await client.get(f"http://127.0.0.1:{port}/health", 10)
        finally:
            await client.close()
            server.close()

    asyncio.run(main())

"""Whether servers that a run would attach to answer now."""

import asyncio
from collections.abc import Sequence

from real_megatron.rollout.remote.errors import Unreachable
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.loop import LoopThread


def silent_servers(urls: Sequence[str], timeout_s: float) -> dict[str, str]:
    """Of the servers that do not answer `GET /health` with status 200 within the time: why, by URL. They are asked at
    once, without an API key, which health checks need none of."""

    async def ask() -> dict[str, str]:
        http = Http()
        try:
            replies = await asyncio.gather(*(one(http, url) for url in urls))
        finally:
            await http.close()
        return {url: reason for url, reason in zip(urls, replies, strict=True) if reason}

    async def one(http: Http, url: str) -> str:
        try:
            reply = await http.get(url.rstrip("/") + "/health", timeout_s, anonymous=True)
        except Unreachable as error:
            return str(error)
        return "" if reply.status == 200 else reply.describe()

    loop = LoopThread("probe")
    try:
        return loop.run(ask())
    finally:
        loop.close()

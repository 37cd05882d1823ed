"""HTTP to rollout servers: connections kept open, a deadline on each request, one error for all that can go wrong."""

import asyncio
import gc
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from real_megatron.rollout.remote.errors import Unreachable, WrongServer

_CONNECT_S = 10
# Servers close idle connections after 5 s (uvicorn's default). Closed earlier here, no request is lost with one.
_KEEPALIVE_S = 3
_READ_BUFFER_BYTES = 2**20


@dataclass(frozen=True)
class Reply:
    """A whole reply, whatever its status."""

    status: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body as strict JSON: not NaN or Infinity either. Raises ValueError.

        orjson, because most of a step's replies are log-probabilities, which it reads four times as fast as json. And
        without garbage collection meanwhile: a list for each token, of hundreds of replies, makes Python look through
        all objects of the process over and over, which takes longer than the reading. A tree of JSON has no cycles.
        """
        collecting = gc.isenabled()
        gc.disable()
        try:
            return orjson.loads(self.body)
        finally:
            if collecting:
                gc.enable()

    @property
    def unauthorized(self) -> bool:
        """Whether the request's API key was not accepted."""
        return self.status in (401, 403)

    def describe(self) -> str:
        """Status and text, for an error message."""
        hint = " (its API key: see rollout.api_key_variable)" if self.unauthorized else ""
        return f"status {self.status}{hint}: {self.text[:500]}"

    def check(self, url: str) -> None:
        """Raise Unreachable unless the status is 200, WrongServer when the API key was not accepted."""
        if self.unauthorized:
            raise WrongServer(f"{url}: {self.describe()}")
        if self.status != 200:
            raise Unreachable(f"{url}: {self.describe()}")


class Http:
    """Requests to any number of servers. Built and used inside one event loop.

    aiohttp, because its cost per request does not grow with the number of connections: httpx visits all of them at
    each request, which with 64 requests in flight took a third of a core.
    """

    def __init__(self, key: str | None = None) -> None:
        """key: the API key that requests carry, as a bearer token; None: servers need none"""
        self._authorization = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No limit on connections, since the pool of replicas bounds them, and no proxies from the environment.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=_READ_BUFFER_BYTES,
            trust_env=False,
        )

    async def post(self, url: str, body: dict[str, Any], timeout_s: float) -> Reply:
        """Raises Unreachable unless a whole reply arrives within the deadline."""
        return await self._request("POST", url, body, timeout_s, self._authorization)

    async def get(self, url: str, timeout_s: float, *, anonymous: bool = False) -> Reply:
        """Raises Unreachable unless a whole reply arrives within the deadline. anonymous: without the API key"""
        return await self._request("GET", url, None, timeout_s, {} if anonymous else self._authorization)

    async def _request(
        self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float, headers: dict[str, str]
    ) -> Reply:
        try:
            async with (
                asyncio.timeout(timeout_s),
                # A redirection would carry the key to another server.
                self._session.request(method, url, json=body, headers=headers, allow_redirects=False) as reply,
            ):
                return Reply(reply.status, await reply.read())
        except (aiohttp.ClientError, ConnectionError) as error:
            raise Unreachable(f"{type(error).__name__}: {error}") from error
        except TimeoutError as error:
            raise Unreachable(f"no reply within {timeout_s:g} s") from error

    async def close(self) -> None:
        await self._session.close()

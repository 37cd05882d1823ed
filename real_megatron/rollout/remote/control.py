"""Control requests: one server, one attempt, no routing."""

import asyncio

import httpx

from real_megatron.rollout.remote.errors import RolloutError
from real_megatron.rollout.remote.replica import Replica

_LONGEST_STEP_S = 120


class ControlClient:
    """Requests to single servers; a refusal or a missed deadline is a RolloutError."""

    def __init__(self, http: httpx.AsyncClient, timeout_s: float) -> None:
        """timeout_s: of requests that load whole checkpoints; `step_s`, of all others, is shorter, since the trainer's
        ranks wait for them inside a collective export, which has a deadline of its own"""
        self._http = http
        self.timeout_s = timeout_s
        self.step_s = min(timeout_s, _LONGEST_STEP_S)

    async def post(self, replica: Replica, path: str, body: dict, timeout_s: float | None = None) -> dict:
        try:
            async with asyncio.timeout(timeout_s or self.step_s):
                reply = await self._http.post(replica.url + path, json=body)
        except TimeoutError as error:
            raise RolloutError(f"{replica.url}{path}: no reply within {timeout_s or self.step_s:g} s") from error
        except httpx.HTTPError as error:
            raise RolloutError(f"{replica.url}{path}: {error!r}") from error
        if reply.status_code != 200:
            raise RolloutError(f"{replica.url}{path}: status {reply.status_code}: {reply.text[:500]}")
        try:
            return reply.json()
        except ValueError:
            return {}

    async def get(self, replica: Replica, path: str) -> dict:
        try:
            reply = await self._http.get(replica.url + path, timeout=self.step_s)
            reply.raise_for_status()
            return reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise RolloutError(f"{replica.url}{path}: {error!r}") from error

"""Control requests: one server, one attempt, no routing."""

import httpx

from real_megatron.rollout.remote.errors import RolloutError
from real_megatron.rollout.remote.replica import Replica


class ControlClient:
    """Requests to single servers; a refusal or a missed deadline is a RolloutError."""

    def __init__(self, http: httpx.AsyncClient, timeout_s: float) -> None:
        self._http = http
        self.timeout_s = timeout_s

    async def post(self, replica: Replica, path: str, body: dict) -> dict:
        try:
            reply = await self._http.post(replica.url + path, json=body, timeout=self.timeout_s)
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
            reply = await self._http.get(replica.url + path, timeout=60)
            reply.raise_for_status()
            return reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise RolloutError(f"{replica.url}{path}: {error!r}") from error

"""One request, until it is answered: routing, deadline, retries."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from real_megatron.errors import EngineError
from real_megatron.rollout.remote.errors import Retryable, ServerFault, StaleReply, Unreachable
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.replica import Replica, ReplicaPool

logger = logging.getLogger(__name__)
T = TypeVar("T")
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 10.0


class RequestClient:
    """Posts requests to a pool's replicas, or to one router in front of them."""

    def __init__(
        self,
        http: Http,
        pool: ReplicaPool,
        timeout_s: float,
        attempts: int,
        router: str | None,
        confirm: Callable[[Replica], Awaitable[None]],
    ) -> None:
        """confirm: raises Retryable or StaleReply when a good reply that just came from this replica must not count"""
        self._http = http
        self._pool = pool
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._router = router.rstrip("/") if router else None
        self._confirm = confirm

    async def request(self, what: str, path: str, body: dict[str, Any], parse: Callable[[Any, Replica], T]) -> T:
        """`parse(reply, replica)` of the first good reply.

        Connection loss, a missed deadline, 5xx, a reply that is no JSON, and a Retryable from `parse` are tried again
        elsewhere, after a pause with jitter; unless the fault is in one reply alone, the server is asked whether it is
        well. Any other status, and the last failure, is an EngineError that names `what`. A reply counts whole or not
        at all.
        """
        failures: list[str] = []
        for attempt in range(self._attempts):
            if attempt:
                pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            replica = await self._pool.acquire()
            url, incarnation = self._router or replica.url, replica.incarnation
            try:
                replica.check_process()
                result = parse(await self._post(url + path, body), replica)
                replica.check_process()
                await self._confirm(replica)
                replica.failures_in_a_row = 0
                return result
            except (Unreachable, Retryable) as error:
                failures.append(f"{url}: {error}")
                logger.info("%s, attempt %d: %s", what, attempt + 1, failures[-1])
                suspect = isinstance(error, (Unreachable, ServerFault, StaleReply))
                if suspect and replica.incarnation == incarnation:  # else it has been replaced or asked meanwhile
                    self._suspect(replica, failures[-1])
            finally:
                self._pool.release(replica)
        raise EngineError(f"{what} failed {self._attempts} times: " + "; ".join(failures))

    async def _post(self, url: str, body: dict[str, Any]) -> Any:
        reply = await self._http.post(url, body, self._timeout_s)
        if reply.status >= 500:
            raise ServerFault(reply.describe())
        if reply.status != 200:
            raise EngineError(f"{url} refused the request with {reply.describe()}")
        try:
            return reply.json()
        except ValueError as error:
            raise Retryable(f"the reply is not JSON ({error}): {reply.text[:100]!r}…") from error

    def _suspect(self, replica: Replica, reason: str) -> None:
        # A router does not say which server answered.
        for suspect in self._pool.replicas if self._router else [replica]:
            self._pool.recover(suspect, reason)

"""Control requests: one server, one attempt, no routing."""

from real_megatron.errors import EngineError
from real_megatron.rollout.remote.errors import Unreachable
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.replica import Replica

_LONGEST_STEP_S = 120


class ControlClient:
    """Requests to single servers; a refusal or a missed deadline is an EngineError."""

    def __init__(self, http: Http, timeout_s: float) -> None:
        """timeout_s: of requests that load whole checkpoints; `step_s`, of all others, is shorter, since the trainer's
        ranks wait for them inside a collective export, which has a deadline of its own"""
        self._http = http
        self.timeout_s = timeout_s
        self.step_s = min(timeout_s, _LONGEST_STEP_S)

    async def post(self, replica: Replica, path: str, body: dict, timeout_s: float | None = None) -> dict:
        try:
            replica.check_process()
            reply = await self._http.post(replica.url + path, body, timeout_s or self.step_s)
        except Unreachable as error:
            raise EngineError(f"{replica.url}{path}: {error}") from error
        if reply.status != 200:
            raise EngineError(f"{replica.url}{path}: {reply.describe()}")
        try:
            return reply.json()
        except ValueError:
            return {}

    async def get(self, replica: Replica, path: str) -> dict:
        try:
            replica.check_process()
            reply = await self._http.get(replica.url + path, self.step_s)
        except Unreachable as error:
            raise EngineError(f"{replica.url}{path}: {error}") from error
        if reply.status != 200:
            raise EngineError(f"{replica.url}{path}: {reply.describe()}")
        try:
            return reply.json()
        except ValueError as error:
            raise EngineError(f"{replica.url}{path}: the reply is not JSON: {error}") from error

"""Lets only requests with the API key in VLLM_API_KEY reach a vLLM server: `--middleware vllm_guard.RequireKey`.

vLLM 0.32 itself asks for the key on the routes below /v1 and a few others: whoever reached the server could still load
weights, or call any method of its engine (/collective_rpc). Runs in vLLM's own environment; needs nothing of
real_megatron.
"""

import hmac
import os

_OPEN = ("/health",)


class RequireKey:
    """ASGI middleware: 401 unless the request carries the key as a bearer token. The health check is open."""

    def __init__(self, app) -> None:
        self._app = app
        self._expected = b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
                return
        await self._app(scope, receive, send)

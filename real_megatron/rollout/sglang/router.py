"""sglang-router in front of the servers of a launch: whether it is installed, and how it is started."""

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from real_megatron.config import RolloutConfig
from real_megatron.rollout.remote.process import LAUNCHER, LAUNCHER_KEY, ServerProcess

PACKAGE = "sglang_router"
_METRICS_PORT = 1
"""Of the router's metrics, from its own port on: it has no switch for them, and they need no key, so that they are
served to its own host alone."""
_IMPORT_S = 120


def router_installed(config: RolloutConfig) -> bool:
    """Whether the Python of the servers can import sglang-router."""
    command = [config.python or sys.executable, "-c", f"import {PACKAGE}.router"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_IMPORT_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def router_process(
    config: RolloutConfig, servers: Sequence[str], host: str, port: int, logs: Path, key: str
) -> ServerProcess:
    """The router, not started yet, on an address and port of this machine; the port behind it is taken, too.

    servers: URLs of all servers, whether they are up yet or not
    key: of the servers; the router asks for the same one, except at /health, /readiness, /liveness and /v1/models
    """
    arguments = [config.python or sys.executable, str(LAUNCHER), "start_router"]
    arguments += ["--host", host, "--port", str(port), "--worker-urls", *servers]
    # The server with the fewest requests, and of equals the one that has seen most of the prompt. By its defaults the
    # router prefers prompts seen to idle servers up to a difference of 64 requests: prompts with one template in
    # front would all go to one server.
    arguments += ["--policy", "cache_aware", "--balance-abs-threshold", "0", "--balance-rel-threshold", "1.0"]
    # /health generates a token, which a server that takes new weights does not do.
    arguments += ["--health-check-endpoint", "/model_info", "--health-check-interval-secs", "5"]
    # A server that is started again is used again in seconds, not minutes.
    arguments += ["--health-success-threshold", "1", "--worker-startup-check-interval", "1"]
    arguments += ["--cb-success-threshold", "1", "--cb-timeout-duration-secs", "5"]
    arguments += ["--worker-startup-timeout-secs", str(math.ceil(config.start_timeout_s))]
    arguments += ["--request-timeout-secs", str(math.ceil(config.timeout_s))]
    arguments += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(port + _METRICS_PORT)]
    arguments += ["--log-level", "warn"]  # else several lines a request
    return ServerProcess(arguments, logs, "router", {LAUNCHER_KEY: key})

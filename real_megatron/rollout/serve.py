"""The servers of a rollout node, for a run that trains on other nodes and attaches to them (`rollout.servers`).

    python -m real_megatron.rollout.serve CONFIG [KEY=VALUE …] --host ADDRESS --gpus 8 --logs DIRECTORY

Starts as many servers as the node's GPUs hold, at `rollout.tensor` each, on ports from `SERVER_PORT` on, and starts one
that dies again: the trainer brings it up to date. Ends them at SIGTERM or SIGINT. Their API key is taken from the
environment variable `KEY_VARIABLE`, in which a launcher hands the same one to the trainer.

With `--router URL …`, the URLs of the servers of all nodes, a router stands in front of them, on `ROUTER_PORT`; it is
started again like a server.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError, EngineError, UserError, refuse
from real_megatron.hf.directory import checkpoint_directory, load_tokenizer
from real_megatron.rollout.engine import EngineSpec
from real_megatron.rollout.factory import find_engine
from real_megatron.rollout.remote.engine import served_tokens
from real_megatron.rollout.remote.process import ServerProcess
from real_megatron.rollout.rollout_hosts import KEY_VARIABLE, ROUTER_PORT, SERVER_PORT, servers_of
from real_megatron.rollout.sglang.router import router_process
from real_megatron.runtime import default_dtype

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_PAUSE_S = 10.0
"""Between the end of a server and its next start: one that cannot start would fill the disk with logs."""


def node_servers(config: RunConfig, host: str, gpus: int, logs: Path, key: str) -> list[ServerProcess]:
    """The servers of this node, not started yet. Raises ConfigError as `servers_of`, CheckpointError for a model that
    cannot be read."""
    kind = find_engine(config.rollout.engine)
    count = servers_of(config, gpus)
    assert kind.server_command is not None
    model_dir = checkpoint_directory(config.model.path, config.model.revision)
    arguments = [*config.rollout.server_args, "--host", host]
    spec = EngineSpec(
        config=config.rollout.model_copy(update={"server_args": arguments, "first_gpu": 0, "servers": []}),
        model_dir=model_dir,
        tokenizer=load_tokenizer(model_dir),
        work_dir=logs,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=config.data.max_response_tokens,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=default_dtype(config.model.dtype),
        fp32_logits=config.model.fp32_logits,
    )
    context = served_tokens(spec, kind)
    servers = []
    for index in range(count):
        command = kind.server_command(spec, index, SERVER_PORT + index, context)
        environment = command.environment | {command.key_variable: key}
        servers.append(ServerProcess(command.arguments, logs, f"{config.rollout.engine}-{index}", environment))
    return servers


def keep_running(servers: Sequence[ServerProcess]) -> None:
    """Start the servers, and each again that ends; until an exception, such as a signal's, ends it and them."""
    again = dict.fromkeys(servers, 0.0)
    try:
        while True:
            for server, when in again.items():
                if server.alive() or time.monotonic() < when:
                    continue
                if server.starts and not when:
                    logger.warning("%s\nstarted again in %g s", server.describe_end(), _PAUSE_S)
                    again[server] = time.monotonic() + _PAUSE_S
                    continue
                server.start()
                again[server] = 0.0
            time.sleep(_POLL_S)
    finally:
        for server in servers:
            server.kill()  # it has nothing to save


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m real_megatron.rollout.serve", description="Serve the rollouts of a run that trains elsewhere."
    )
    parser.add_argument("config", type=Path, help="YAML of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--host", required=True, help="address of this node to listen on; a private network's")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of this node; without any, servers")
    parser.add_argument("--router", nargs="+", metavar="URL", help="start a router in front of these servers")
    parser.add_argument("--logs", type=Path, required=True, help="directory for the servers' logs")
    return parser.parse_args(arguments)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """The command; returns its exit status."""
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    try:
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise ConfigError(f"the environment variable {KEY_VARIABLE} is not set: put the servers' API key in it")
        config = RunConfig.from_yaml(options.config, options.overrides)
        servers = node_servers(config, options.host, options.gpus, options.logs, key)
        if options.router:
            router = router_process(config.rollout, options.router, options.host, ROUTER_PORT, options.logs, key)
            servers.append(router)
        keep_running(servers)
    except (UserError, EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        refuse(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

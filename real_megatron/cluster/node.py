"""What one host of a launch runs: ranks under torchrun, or the servers of rollouts. For examples/launch/node.sh.

    python -m real_megatron.cluster.node HOSTFILE INDEX train|sft CONFIG [KEY=VALUE …]

prints, each followed by a NUL: the host's name, its role, the variables of its environment (`NAME=VALUE`),
an empty string, and the command. INDEX counts the hosts of the file from 0.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from real_megatron.cluster.hostfile import Host, read_hosts, with_addresses
from real_megatron.config import RunConfig
from real_megatron.doctor.machine import interface_of, interfaces
from real_megatron.errors import ConfigError, UserError, refuse
from real_megatron.rollout.rollout_hosts import KEY_VARIABLE, ROUTER_PORT, SERVER_PORT, check_router, servers_of
from real_megatron.rollout.sglang.router import router_installed

RENDEZVOUS_PORT = 29500
"""Where the ranks of a launch meet, on the first training host."""
NETWORK_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def torchrun(
    python: str, hosts: Sequence[Host], addresses: Sequence[str], index: int, run_id: str, port: int = RENDEZVOUS_PORT
) -> list[str]:
    """torchrun on training host `index` of `hosts`, which are the training hosts alone, up to the module to run.

    A host may not know its own name, and several may have one, so it is said who opens the store of the rendezvous, and
    under which address each is reached.
    """
    return [
        *(python, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(hosts)}", f"--nproc-per-node={hosts[index].slots}"),
        *("--rdzv-backend=c10d", f"--rdzv-id={run_id}", f"--rdzv-endpoint={addresses[0]}:{port}"),
        *(f"--rdzv-conf=is_host={int(index == 0)}", f"--local-addr={addresses[index]}", "--max-restarts=0"),
    ]


def routed(config: RunConfig, first: Host, servers: int) -> bool:
    """Whether a router of the launch stands in front of the servers. Each host answers this for itself, alike, since
    all have the same paths.

    first: the first rollout host
    """
    if first.router:
        return first.router == "on"
    rollout = config.rollout
    return rollout.engine == "sglang" and rollout.router is None and servers > 1 and router_installed(rollout)


def node_command(
    hosts: Sequence[Host],
    addresses: Sequence[str],
    index: int,
    command: str,
    config_file: str,
    overrides: Sequence[str],
) -> list[str]:
    """The command of host `index`. Raises ConfigError for a configuration that does not fit the hosts.

    Of the environment: PYTHON, LOGS (a directory), RUN_ID, STOP_SECONDS and RENDEZVOUS_PORT.
    """
    python, logs = os.environ.get("PYTHON", sys.executable), Path(os.environ.get("LOGS", "logs"))
    config = RunConfig.from_yaml(Path(config_file), list(overrides))
    host, address = hosts[index], addresses[index]
    placed = list(zip(hosts, addresses, strict=True))
    rollout = [one for one in placed if one[0].role == "rollout"]
    urls = [f"http://{a}:{SERVER_PORT + i}" for h, a in rollout for i in range(servers_of(config, h.slots))]
    if host.role == "rollout":
        serve = [python, "-m", "real_megatron.rollout.serve", config_file, *overrides]
        serve += ["--host", address, "--gpus", str(host.slots), "--logs", str(logs / host.name)]
        first = (host, address) == rollout[0]
        if first and host.router == "on":
            check_router(config)
        return [*serve, "--router", *urls] if first and routed(config, host, len(urls)) else serve
    training = [one for one in placed if one[0].role == "train"]
    port = int(os.environ.get("RENDEZVOUS_PORT", RENDEZVOUS_PORT))
    started = torchrun(
        *(python, [h for h, _ in training], [a for _, a in training], training.index((host, address))),
        *(os.environ.get("RUN_ID", "real"), port),
    )
    # torchrun ends what does not end in time; node.sh ends torchrun itself later than that.
    stop = max(1, int(os.environ.get("STOP_SECONDS", "25")) - 5)
    started += [f"--shutdown-timeout={stop}", f"--log-dir={logs / host.name}", "--tee=3"]
    started += ["-m", "real_megatron", command, config_file, *overrides]
    if urls:
        # Rank 0 sends the weights, from the address of its host; which host that is, the rendezvous decides.
        started += [f"rollout.servers=[{','.join(urls)}]", f"rollout.sync_host={address}"]
        started += [f"rollout.api_key_variable={KEY_VARIABLE}"]
        if routed(config, rollout[0][0], len(urls)):
            started += [f"rollout.router=http://{rollout[0][1]}:{ROUTER_PORT}"]
    return started


def main(arguments: Sequence[str]) -> int:
    """Print what a host runs; returns the exit status."""
    if len(arguments) < 4 or arguments[2] not in ("train", "sft") or not arguments[1].isdecimal():
        print(
            "usage: python -m real_megatron.cluster.node HOSTFILE INDEX train|sft CONFIG [KEY=VALUE …]", file=sys.stderr
        )
        return 2
    hostfile, number, command, config, *overrides = arguments
    index = int(number)
    try:
        hosts = read_hosts(hostfile)
        if index >= len(hosts):
            raise ConfigError(f"{hostfile}: has {len(hosts)} hosts, none of index {index}")
        addresses = with_addresses(hosts)
        run = node_command(hosts, addresses, index, command, config, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        refuse(error)
        return 1
    found = interface_of(addresses[index], interfaces())
    environment = [f"{name}={found}" for name in NETWORK_VARIABLES if found and name not in os.environ]
    words = [hosts[index].name, hosts[index].role, *environment, "", *run]
    sys.stdout.write("".join(f"{word}\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

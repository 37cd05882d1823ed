"""What the answers of the hosts mean: each check gives findings that name a host, what was found, and the fix."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from real_megatron.cluster.hostfile import Host
from real_megatron.doctor.finding import Finding
from real_megatron.doctor.machine import interface_of
from real_megatron.hardware import gpu_reported_as
from real_megatron.planning.efficiency import DEFAULT
from real_megatron.planning.links import group

OFFSET_WARN_S, OFFSET_FAIL_S = 1.0, 60.0
"""Logs of several hosts are read side by side; from a minute on, certificates and file times go wrong."""
DISK_WARN = 50 * 10**9
DISK_FAIL = 10**9
BUSY_MIB = 1024
"""Of a GPU's memory, more than a driver and a display take."""
MARK = "trial: "
"""Before the line of JSON that the trial's rank 0 prints."""
SLOW = 0.5
"""Of the planned rate, below which a collective is said to be slow."""


@dataclass(frozen=True)
class Offset:
    """A host's clock against that of this machine, in seconds; the truth is within `bound` of it."""

    seconds: float
    bound: float


def software(facts: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """All hosts have the first one's versions and commit."""
    names = list(facts)
    first = facts[names[0]]["software"]
    for name in names:
        own = facts[name]["software"]
        differs = [
            f"{what} {own[what] or 'no changes'}, and {names[0]} {first[what] or 'no changes'}"
            for what in first
            if own[what] != first[what]
        ]
        if differs:
            fix = f"install the same there, or let all hosts use {names[0]}'s environment on a shared file system"
            yield Finding("software", name, "broken", "; ".join(differs), fix)
            continue
        listed = ", ".join(f"{what} {found}" for what, found in own.items() if what != "changes")
        if own["changes"]:
            yield Finding("software", name, "warning", f"{listed}, with changes that are not committed", "commit them")
        else:
            yield Finding("software", name, "ok", listed)


def shared_files(directory: str, unseen: Mapping[str, Sequence[str]], failed: Mapping[str, str]) -> Iterator[Finding]:
    """Files of all hosts are seen by all. unseen: by whom, whose files. failed: hosts that could not write, and why"""
    first = next((name for name in unseen if name not in failed), "")
    fix = f"mount one file system at {directory} on all hosts, or name a directory of it with --shared"
    for name in [*failed, *(one for one in unseen if one not in failed)]:
        if name in failed:
            yield Finding("shared files", name, "broken", f"cannot write to {directory}: {failed[name]}", fix)
            continue
        lost = [other for other in unseen[name] if other not in failed]
        if first in lost or name in unseen[first]:
            text = f"{directory} is not that of {first}: a file that one has written, the other does not see"
            yield Finding("shared files", name, "broken", text, fix)
        else:
            yield Finding("shared files", name, "ok", f"{directory}: what each host writes is read by all")


def disk(name: str, directory: str, free: int) -> Finding:
    """Free space of the shared directory, as a host sees it."""
    text = f"{free / 1e9:,.0f} GB free in {directory}"
    if free < DISK_FAIL:
        return Finding("disk", name, "broken", text, "make room, or name another directory")
    if free < DISK_WARN:
        fix = "`--dry-run` of train says how much a run's checkpoints take"
        return Finding("disk", name, "warning", text, fix)
    return Finding("disk", name, "ok", text)


def ports(name: str, asked: Sequence[int], taken: Mapping[str, str]) -> Iterator[Finding]:
    """The ports that a launch uses on a host are free."""
    for port, owner in taken.items():
        fix = "end it (perhaps what is left of an earlier run), or launch with another port"
        yield Finding("ports", name, "broken", f"port {port} is in use by {owner}", fix)
    if not taken:
        yield Finding("ports", name, "ok", f"{', '.join(map(str, asked))} free")


def gpus(hosts: Sequence[Host], facts: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """As many GPUs as slots, of one kind, with nothing on them."""
    if not any(facts[host.name]["gpus"] for host in hosts):
        yield Finding("GPUs", "all", "note", "no host has a GPU: ranks run on the CPU, with gloo")
        return
    kinds = {gpu["name"] for host in hosts if host.role == "train" for gpu in facts[host.name]["gpus"]}
    for host in hosts:
        found = facts[host.name]["gpus"]
        if len(found) < host.slots:
            text = f"{len(found)} GPUs, and {host.slots} slots in the host file"
            yield Finding(
                "GPUs", host.name, "broken", text, f"set slots={len(found)}, or see why nvidia-smi lists fewer"
            )
            continue
        text = f"{len(found)} × {found[0]['name']}, {min(gpu['memory_mib'] for gpu in found) / 1024:.0f} GiB"
        busy = [f"{gpu['index']} ({gpu['used_mib']:,} MiB)" for gpu in found if gpu["used_mib"] > BUSY_MIB]
        if busy:
            fix = "end what runs there: nvidia-smi lists it"
            yield Finding("GPUs", host.name, "broken", f"{text}; memory in use on GPU {', '.join(busy)}", fix)
        elif host.role == "train" and len(kinds) > 1:
            text += f"; training hosts have {' and '.join(sorted(kinds))}"
            yield Finding("GPUs", host.name, "warning", text, "the slowest sets the pace: train on one kind")
        else:
            yield Finding("GPUs", host.name, "ok", text)


def network(addresses: Mapping[str, str], facts: Mapping[str, dict[str, Any]]) -> Iterator[Finding]:
    """The interface that NCCL and gloo are told to use, and InfiniBand."""
    most = max(len(one["infiniband"]) for one in facts.values())
    for name, own in facts.items():
        interface, devices = interface_of(addresses[name], own["interfaces"]), own["infiniband"]
        if not interface:
            listed = "; ".join(f"{one} {', '.join(held)}" for one, held in own["interfaces"].items())
            text = f"no interface holds {addresses[name]}: {listed or 'none is up'}"
            yield Finding("network", name, "broken", text, "add address=IP, one of these, to its line of the host file")
            continue
        text = f"{interface} ({addresses[name]}) for NCCL and gloo; InfiniBand: {', '.join(devices) or 'none'}"
        if len(devices) < most:
            text += f"; another host has {most} devices"
            yield Finding("network", name, "warning", text, "load its driver: ls /sys/class/infiniband")
        else:
            yield Finding("network", name, "ok", text)


def clock(name: str, offset: Offset) -> Finding:
    """A clock against this machine's. What a slow connection leaves open counts in the host's favour."""
    away = max(0.0, abs(offset.seconds) - offset.bound)
    text = f"{offset.seconds:+.3f} s from this machine's, within {offset.bound * 1000:.0f} ms"
    fix = "let chrony or systemd-timesyncd set it"
    if away >= OFFSET_FAIL_S:
        return Finding("clocks", name, "broken", text, fix)
    if away >= OFFSET_WARN_S:
        return Finding("clocks", name, "warning", text, fix)
    return Finding("clocks", name, "ok", text)


def collectives(measured: Mapping[str, Any], per_node: int) -> Iterator[Finding]:
    """Measured bus bandwidth beside what planning assumes. per_node: ranks of a host"""
    ranks, size = measured["ranks"], measured["bytes"]
    # As nccl-tests define it: what each link carries. An all-reduce is a reduce-scatter and an all-gather.
    carried = {"all_reduce": 2 * (ranks - 1) / ranks * size, "broadcast": size}
    gpu = gpu_reported_as(measured["gpu"])
    links = None if gpu is None else group(replace(gpu, per_node=per_node), DEFAULT, 1, ranks)
    planned = {} if links is None else {"all_reduce": 2 * links.gather(size), "broadcast": links.send(size)}
    for what, amount in carried.items():
        rate, name = amount / measured[what], what.replace("_", "-")
        text = f"{size / 2**20:.0f} MiB over {ranks} ranks, {measured['backend']}: {measured[what] * 1e3:.1f} ms"
        if ranks == 1:
            yield Finding("collectives", name, "note", f"{text}; one rank has nobody to send to")
        elif what not in planned:
            where = measured["gpu"] or "a CPU"
            text += f", {rate / 1e9:.2f} GB/s; no figure for {where} to compare with"
            yield Finding("collectives", name, "note", text)
        else:
            expected = amount / planned[what]
            text += f", {rate / 1e9:.1f} GB/s; planned {expected / 1e9:.1f} GB/s"
            slow = rate < SLOW * expected
            fix = "see NCCL_DEBUG=INFO for the interface that it takes, and NCCL_IB_HCA" if slow else ""
            yield Finding("collectives", name, "warning" if slow else "ok", text, fix)

"""Which fast paths a run would take here, and why not; each asks the function that decides it in a run.

    python -m real_megatron.doctor.fast_paths <CONFIG.json         the whole configuration; prints a finding a line

A process of its own, since what it imports may end it.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict

from real_megatron.config import RunConfig
from real_megatron.doctor import requirements
from real_megatron.doctor.finding import Finding, guarded
from real_megatron.errors import ConfigError

TOPIC = "fast paths"


def compilers(config: RunConfig) -> Iterator[Finding]:
    """What could compile the head's kernels."""
    from real_megatron.head import build

    looked_for = (("C++ compiler", build.cxx, "apt-get install g++"), ("nvcc", build.nvcc, "install the CUDA toolkit"))
    for name, find, fix in looked_for:
        try:
            yield Finding("machine", name, "ok", find())
        except build.BuildError as error:
            yield Finding("machine", name, "note", str(error), fix)


def head(config: RunConfig) -> Iterator[Finding]:
    """The output head's row kernels: CUDA, their C++ counterpart, or torch."""
    from real_megatron.head import build, native
    from real_megatron.runtime import default_device, default_dtype

    device, kind = default_device(), {"cuda": "fused CUDA kernels", "cpu": "compiled C++ kernels"}
    fix = "install the CUDA toolkit (nvcc)" if device.type == "cuda" else "apt-get install g++"
    try:
        library = native.built(device.type)
    except build.BuildError as error:
        yield Finding(TOPIC, "head", "note", f"plain torch: {error}", fix)
        return
    if library is None:
        text = f"{kind[device.type]}: compiled at first use, in about a minute"
        yield Finding(TOPIC, "head", "ok", text, f"now: {sys.executable} -m real_megatron.head.build {device.type}")
        return
    reason = native.unsupported(device, default_dtype(config.model.dtype))
    if reason:
        yield Finding(TOPIC, "head", "note", f"plain torch: {reason}", fix)
    else:
        yield Finding(TOPIC, "head", "ok", f"{kind[device.type]}, {library}")


def attention(config: RunConfig) -> Iterator[Finding]:
    """Block-sparse flex_attention, or segments one after the other with dense masks."""
    from torch.utils._triton import has_triton

    from real_megatron.policy.attention import attention_on
    from real_megatron.policy.flex import flex_segment_attention
    from real_megatron.runtime import default_device

    if attention_on(default_device()) is not flex_segment_attention:
        yield Finding(TOPIC, "attention", "note", "dense masks, segment by segment: no GPU")
    elif has_triton():
        yield Finding(TOPIC, "attention", "ok", "flex_attention, compiled with Triton")
    else:
        text = "flex_attention cannot be compiled: no Triton for this GPU"
        yield Finding(TOPIC, "attention", "broken", text, "pip install triton")


def layers(config: RunConfig) -> Iterator[Finding]:
    """Transformer Engine's layers and grouped experts, or Megatron-Core's local ones."""
    from real_megatron.policy.layers import uses_transformer_engine
    from real_megatron.policy.parallel_groups import no_transformer_engine

    used, reason = uses_transformer_engine(config.model), no_transformer_engine()
    fix = "" if reason == "no GPU" else requirements.install_transformer_engine()
    if used and reason:
        text = f"model.spec is transformer_engine: {reason}"
        yield Finding(TOPIC, "layers", "broken", text, fix or "set model.spec to auto")
        return
    if used:
        yield Finding(TOPIC, "layers", "ok", "Transformer Engine")
        yield Finding(TOPIC, "experts", "ok", "one grouped matrix product (Transformer Engine)")
        return
    reason = reason or "model.spec is local"
    fix = fix if reason != "model.spec is local" else "set model.spec to auto"
    yield Finding(TOPIC, "layers", "note", f"Megatron-Core's local layers: {reason}", fix)
    yield Finding(TOPIC, "experts", "note", f"one expert after the other: {reason}", fix)


def adam(config: RunConfig) -> Iterator[Finding]:
    """Megatron-Core's choice of Adam."""
    from real_megatron.policy.optimizer import has_fused_adam
    from real_megatron.runtime import default_device

    if has_fused_adam():
        yield Finding(TOPIC, "Adam", "ok", "fused")
    else:
        text = "torch's: neither Transformer Engine nor Apex can be imported"
        install = requirements.install_transformer_engine()
        yield Finding(TOPIC, "Adam", "note", text, install if default_device().type == "cuda" else "")


def megatron(config: RunConfig) -> Iterator[Finding]:
    """Whether a run would take the installed Megatron-Core."""
    from real_megatron.policy import megatron_versions

    try:
        megatron_versions.check()
    except ConfigError as error:
        yield Finding(TOPIC, "Megatron-Core", "broken", str(error))


def weight_sync(config: RunConfig) -> Iterator[Finding]:
    """How weights reach the servers, and whether both ends agree."""
    import torch

    from real_megatron.rollout.factory import find_engine
    from real_megatron.rollout.nccl import check_nccl, own_version
    from real_megatron.rollout.remote.servers import weight_sync as chosen

    rollout = config.rollout
    kind = find_engine(rollout.engine)
    if not kind.server_package:
        yield Finding(TOPIC, "weight sync", "ok", f"in memory: rollout.engine {rollout.engine} has no servers")
        return
    way = chosen(rollout, kind.broadcasts)
    if way == "disk":
        yield Finding(TOPIC, "weight sync", "ok", "files, which servers read")
    elif not torch.cuda.is_available():
        yield Finding(TOPIC, "weight sync", "note", f"{'shared memory' if way == 'tensor' else 'gloo'}: no GPU")
    elif way == "tensor":
        from torch.multiprocessing.reductions import reduce_tensor

        reduce_tensor(torch.empty(1, device="cuda"))  # raises where the driver or the allocator gives no handles
        yield Finding(TOPIC, "weight sync", "ok", "CUDA IPC")
    elif rollout.servers:
        text = f"NCCL {own_version()} here; attached servers do not tell theirs, which must be the same"
        yield Finding(TOPIC, "weight sync", "note", text)
    else:
        try:
            check_nccl(rollout.python or sys.executable)
        except ConfigError as error:
            yield Finding(TOPIC, "weight sync", "broken", str(error))
        else:
            yield Finding(TOPIC, "weight sync", "ok", f"NCCL {own_version()} on both ends")


def servers(config: RunConfig) -> Iterator[Finding]:
    """Whether a run could start the servers, or reach them; without NCCL, which `weight_sync` compares."""
    import torch

    from real_megatron.rollout.factory import Node, check_servers, find_engine

    if not find_engine(config.rollout.engine).server_package:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    node = Node(torch.cuda.device_count(), ranks) if torch.cuda.is_available() else None
    try:
        check_servers(config.rollout, trainer=True, node=node)
    except ConfigError as error:
        yield Finding("servers", config.rollout.engine, "broken", str(error))


LOOKS: dict[str, Callable[[RunConfig], Iterator[Finding]]] = {
    "compilers": compilers,
    "Megatron-Core": megatron,
    "head": head,
    "attention": attention,
    "layers": layers,
    "Adam": adam,
    "weight sync": weight_sync,
    "servers": servers,
}
"""In this order; each name is that of its first finding."""


def findings(config: RunConfig) -> Iterator[Finding]:
    """All fast paths of a run with this configuration."""
    for name, look in LOOKS.items():
        yield from guarded(TOPIC, name, lambda look=look: look(config))  # type: ignore[misc]  # bound now


def main() -> None:
    # What packages print goes elsewhere.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for finding in findings(RunConfig.from_tree(json.load(sys.stdin))):
        print(json.dumps(asdict(finding)), file=lines, flush=True)
    print(json.dumps("done"), file=lines, flush=True)
    os._exit(0)  # a package's own end could be another crash


if __name__ == "__main__":
    main()

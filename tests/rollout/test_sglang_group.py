"""The order of CUDA streams in which the trainer sends weights, checked on stand-ins for streams."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from real_megatron.rollout.sglang.group import SenderGroup


@pytest.mark.parametrize("exported", [True, False], ids=["a sync", "restored from the host"])
def test_a_broadcast_leaves_the_default_stream_to_the_policy(exported, monkeypatch):
    log: list[str] = []
    current = ["default"]

    class Stream:
        def __init__(self, device: torch.device) -> None: ...

        def wait_stream(self, other: str) -> None:
            log.append(f"own waits for {other}")

        def synchronize(self) -> None:
            log.append("host waits for own")

    @contextmanager
    def on(stream: Stream):
        current[0] = "own"
        yield
        current[0] = "default"

    def to(device: torch.device) -> str:
        log.append(f"copied on {current[0]}")
        return "on the device"

    def broadcast(tensors: list[str], options: object) -> SimpleNamespace:
        assert tensors == ["on the device"]
        log.append(f"broadcast on {current[0]}")
        return SimpleNamespace(wait=lambda: log.append(f"{current[0]} waits for it"))

    stand_ins = {"Stream": Stream, "stream": on, "default_stream": lambda device: "default"}
    for name, stand_in in (stand_ins | {"set_device": lambda device: None}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    sender = SenderGroup("name", "nccl", torch.device("cuda", 0), "127.0.0.1", timeout_s=5)
    sender._group = SimpleNamespace(broadcast=broadcast)
    flat = SimpleNamespace(is_cuda=exported, to=to, record_stream=lambda stream: log.append("kept for own"))
    sender.broadcast(flat)
    expected = ["copied on own", "broadcast on own", "own waits for it", "host waits for own"]
    assert log == (["own waits for default", "kept for own"] if exported else []) + expected

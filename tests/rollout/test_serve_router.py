"""The router of a launch in front of fake servers: a real sglang-router, where it is installed
(tests/run.sh --sglang)."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote import client
from real_megatron.rollout.remote.engine import RemoteEngine
from real_megatron.rollout.remote.http import Http
from real_megatron.rollout.remote.ports import free_ports
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.sglang.router import router_installed
from tests.support.rollout_fake_server import VOCABULARY, FakeServer, expected_ids
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec

KEY = "key-of-servers-" + "0123456789" * 5
# A template in front that all prompts have.
PROMPTS = [[*range(5, 20), i, i + 1] for i in range(1, 33)]
PARAMS = SamplingParams(n=2, max_new_tokens=8)
SERVE = """
import sys
from pathlib import Path
from real_megatron.config import RolloutConfig
from real_megatron.rollout import serve
from real_megatron.rollout.sglang.router import router_process

serve._PAUSE_S = 0.5
python, port, logs, key, *servers = [*sys.argv[1:4], sys.stdin.readline().strip(), *sys.argv[4:]]
router = router_process(RolloutConfig(engine="sglang", python=python), servers, "127.0.0.1", int(port), Path(logs), key)
serve.keep_running([router])
"""


def within(limit_s: float, what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Routed:
    """A router, as a rollout host keeps it, in front of two fake servers."""

    def __init__(self, python: str, fakes: list[FakeServer], directory: Path) -> None:
        self.fakes = fakes
        self.logs = directory / "logs"
        self.port = next(port for port in free_ports(1))
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = [python, str(self.port), str(self.logs), *(fake.url for fake in fakes)]
        self.keeper = subprocess.Popen([sys.executable, "-c", SERVE, *arguments], stdin=subprocess.PIPE)
        assert self.keeper.stdin is not None
        self.keeper.stdin.write(f"{KEY}\n".encode())
        self.keeper.stdin.close()

    def processes(self) -> dict[int, str]:
        """The router's, by id, with their command lines."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if "start_router" in command and f"--port {self.port} " in command:
                found[int(folder.name)] = command
        return found


@pytest.fixture
def routed(sglang_python: str, tmp_path: Path) -> Iterator[Routed]:
    if not router_installed(RolloutConfig(engine="sglang", python=sglang_python)):
        pytest.skip("sglang-router is not installed")
    with FakeServer(key=KEY) as first, FakeServer(key=KEY) as second:
        made = Routed(sglang_python, [first, second], tmp_path)
        try:
            yield made
        finally:
            made.keeper.kill()
            made.keeper.wait()
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def engine(routed: Routed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteEngine]:
    """A trainer's, attached to the servers and their router. It begins while the router still starts."""
    monkeypatch.setenv("KEY_OF_SERVERS", KEY)
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)
    AutoModelForCausalLM.from_config(tiny_qwen3(VOCABULARY, max_position_embeddings=64)).save_pretrained(tmp_path / "m")
    for fake in routed.fakes:
        fake.model_path = str(tmp_path / "m")
    urls = [fake.url for fake in routed.fakes]
    config = RolloutConfig(
        engine="sglang", servers=urls, router=routed.url, api_key_variable="KEY_OF_SERVERS", weight_sync="disk"
    )
    made = SGLangEngine(engine_spec(config, tmp_path / "m", tmp_path / "work", serve_loaded=True))
    yield made
    made.close()


def generates(engine: RemoteEngine) -> bool:
    groups = engine.generate(PROMPTS, PARAMS)
    return all(
        response.token_ids == expected_ids(prompt, k, 6)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for k, response in enumerate(group)
    )


def statuses(router: str, key: str | None) -> tuple[int, int]:
    """Of a request to generate, and of one to add a server, with this key."""

    async def ask() -> tuple[int, int]:
        http = Http(key)
        try:
            generated = await http.post(router + "/generate", {"input_ids": [1], "sampling_params": {}}, 10)
            return generated.status, (await http.post(router + "/workers", {"url": "http://127.0.0.1:1"}, 10)).status
        finally:
            await http.close()

    return asyncio.run(ask())


@pytest.mark.sglang
def test_a_router_shares_requests_out_guards_them_and_comes_back(routed: Routed, engine: RemoteEngine) -> None:
    for fake in routed.fakes:
        fake.faults = [0.2] * len(PROMPTS)  # seconds for a reply, so that requests are in flight together
    assert generates(engine)
    assert [fake.generations for fake in routed.fakes] == [16, 16], "the template is no reason to prefer a server"

    assert {statuses(routed.url, key) for key in (None, "wrong")} == {(401, 401)}
    # Its key stands where only its owner reads it.
    first = routed.processes()
    assert first and KEY not in "".join(first.values())

    for pid in first:
        os.kill(pid, signal.SIGKILL)
    assert generates(engine), "the trainer waits until it is back"
    again = routed.processes()
    assert again and not first.keys() & again.keys()
    assert len(list(routed.logs.iterdir())) == 2
    assert not [log for log in routed.logs.iterdir() if KEY in log.read_text(errors="replace")]

    routed.keeper.kill()
    within(10, lambda: not routed.processes())

"""A server is asked and changed only when it is the one asked for: started here or named, with the right model and key.

Another's server, here always a healthy one that would take any request, must be left as it was found.
"""

import asyncio
import importlib.util
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import ConfigError, EngineError
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.factory import check_servers
from real_megatron.rollout.remote import client, replica, servers
from real_megatron.rollout.remote.ports import free_ports, in_use
from real_megatron.rollout.remote.process import LAUNCHER
from real_megatron.rollout.sglang import distributed_transport
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.vllm.engine import VLLMEngine
from real_megatron.scores import Branch
from tests.support.rollout_fake_server import FAKE, VOCABULARY, FakeServer, expected_ids, python_that_runs
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec

ENGINES = {"sglang": SGLangEngine, "vllm": VLLMEngine}
PROMPTS = [[i, i + 1, 5] for i in range(1, 4)]
PARAMS = SamplingParams(n=2, max_new_tokens=8)
# Loads its model for ever: it neither listens nor ends.
LOADING = """
    import sys
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(replica, "_POLL_S", 0.05)


@pytest.fixture(scope="module")
def model():
    # vLLM has no attention for smaller heads on a CPU.
    return AutoModelForCausalLM.from_config(tiny_qwen3(VOCABULARY, max_position_embeddings=64, head_dim=32))


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(params=["sglang", "vllm"])
def flavour(request):
    return request.param


@pytest.fixture
def build(model_dir, tmp_path):
    """build(flavour, body of the local server, serve_loaded, **rollout settings) -> engine; closed at the end."""
    engines = []

    def make(flavour, body=FAKE, serve_loaded=True, **settings):
        settings = {"weight_sync": "disk", "python": python_that_runs(tmp_path, body)} | settings
        spec = engine_spec(
            RolloutConfig(engine=flavour, **settings), model_dir, tmp_path / "work", serve_loaded=serve_loaded
        )
        engines.append(ENGINES[flavour](spec))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def serve(model_dir):
    """serve(flavour, port, key) -> another's server, with the model that is asked for."""
    started = []

    def start(flavour, port=0, key=None):
        server = FakeServer(flavour, port, key)
        server.model_path = str(model_dir)
        started.append(server.__enter__())
        return server

    yield start
    for server in started:
        server.__exit__()


def left_alone(server: FakeServer) -> bool:
    return not server.calls and not server.generations and server.version == "default"


def works(engine) -> bool:
    groups = engine.generate(PROMPTS, PARAMS)
    return [[r.token_ids for r in g] for g in groups] == [[expected_ids(p, k, 6) for k in range(2)] for p in PROMPTS]


# --- local servers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serve_loaded", [True, False])
def test_a_port_with_anothers_server_is_refused_before_a_start(build, serve, tmp_path, flavour, serve_loaded):
    """To judge, its scores would pass for those of the model that was named; in training its weights would change."""
    other = serve(flavour)
    message = f"rollout.port: port {other.port} of 127.0.0.1 is in use by another process: .* set rollout.port"
    with pytest.raises(EngineError, match=message) as refused:
        build(flavour, port=other.port, serve_loaded=serve_loaded)
    assert "given up" not in str(refused.value)
    assert left_alone(other) and not (tmp_path / "work/logs").exists()


def test_a_port_in_use_is_refused_before_a_model_is_loaded(serve, monkeypatch, flavour):
    port = next(port for port in free_ports(100) if not in_use(port + 1))
    other = serve(flavour, port + 1)
    config = RolloutConfig(engine=flavour, python="python3", port=port, replicas=2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"rollout.port: port {other.port} of .* the first of 2 free ports"):
        check_servers(config, trainer=False)
    monkeypatch.setenv("RANK", "8")  # perhaps on another node
    check_servers(config, trainer=False)


@pytest.mark.parametrize("key", [None, "anothers"])
def test_who_takes_the_port_while_ours_loads_is_not_taken_for_ours(build, serve, monkeypatch, caplog, flavour, key):
    """Between the look at the port and the moment at which ours would listen, and fail to."""
    monkeypatch.setattr(servers, "in_use", lambda port: False)
    other = serve(flavour, key=key)
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(EngineError, match=f"another process serves at {other.url}, .* rollout.port to a free port"),
    ):
        build(flavour, LOADING, port=other.port)
    assert left_alone(other)
    ours = int(re.search(r"process (\d+), log", caplog.text)[1])
    with pytest.raises(ProcessLookupError):
        os.killpg(ours, 0)


@pytest.mark.parametrize("serve_loaded", [True, False])
def test_who_takes_the_port_of_a_crashed_server_is_not_asked(build, serve, model, flavour, serve_loaded):
    (port,) = free_ports(1)
    engine = build(flavour, port=port, restarts=2, serve_loaded=serve_loaded)
    if not serve_loaded:
        engine.update_weights(model.named_parameters(), 1)
    assert works(engine)
    process = engine._pool.replicas[0].process
    leader = process._process
    os.killpg(process.pid, signal.SIGKILL)
    leader.wait()
    other = serve(flavour, port)
    with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is in use"):
        if serve_loaded:
            engine.generate(PROMPTS, PARAMS)
        else:
            engine.update_weights(model.named_parameters(), 2)
    assert left_alone(other)


def test_a_local_server_must_have_the_model_that_was_asked_for(build, flavour):
    option = {"sglang": "--model-path", "vllm": "--model"}[flavour]
    with pytest.raises(EngineError, match=r"serves /other, asked for is .*: start it with that path"):
        build(flavour, server_args=[option, "/other"])


def test_every_request_to_a_local_server_carries_a_key_of_the_run(build, model, flavour, tmp_path):
    """The server here refuses each one without. Neither other users nor logs see the key."""
    engine = build(flavour, serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    assert works(engine) and engine.branch_logprobs(PROMPTS, [Branch((), (3,))]).shape == (3, 1)
    engine.sleep()
    engine.update_weights(model.named_parameters(), 2)
    engine.wake()
    engine.sleep()
    engine.wake()
    assert works(engine)
    (process,) = [r.process for r in engine._pool.replicas]
    assert process.starts == 1
    key = engine.api_key
    assert len(key) >= 32 and key.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert not any(key in path.read_text(errors="replace") for path in (tmp_path / "work/logs").iterdir())
    assert servers.api_key(engine._config) != key


def test_the_launcher_hands_the_key_over_inside_the_process_and_keeps_it_out_of_logs(tmp_path):
    """In processes that the server spawns, too. SGLang logs its arguments, by `basicConfig(force=True)`."""
    (tmp_path / "logs.py").write_text(
        "import logging, os, sys\n"
        "def log(who):\n"
        "    logging.basicConfig(format='%(message)s', level=logging.INFO, force=True)\n"
        "    logging.info(f'{who} args={sys.argv}')\n"
        "    logging.info('%s args=%s', who, {'api_key': os.environ['LAUNCH_API_KEY']})\n"
        "    logging.info('%d of %s', 7, who)\n"
    )
    (tmp_path / "server.py").write_text(
        "import logs, multiprocessing, os, sys\n"
        "assert sys.argv[-4:] == ['--port', '1', '--api-key', os.environ['LAUNCH_API_KEY']]\n"
        "logs.log('server')\n"
        "child = multiprocessing.get_context('spawn').Process(target=logs.log, args=('child',))\n"
        "child.start()\n"
        "child.join()\n"
    )
    key = "c0ffee" * 8
    with subprocess.Popen(
        [sys.executable, LAUNCHER, "server", "--port", "1"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "LAUNCH_API_KEY": key},
        start_new_session=True,
    ) as server:
        log = server.stderr.read()
    lines = log.splitlines()
    assert server.returncode == 0 and len(lines) == 6, log
    assert sum("[API key]" in line for line in lines) == 4 and key not in log
    assert lines[2] == "7 of server" and lines[5] == "7 of child"


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/collective_rpc", None, 401),
        ("/collective_rpc", b"Bearer another", 401),
        ("/collective_rpc", b"secret", 401),
        ("/v1/completions", None, 401),
        ("/health/", None, 401),
        ("/collective_rpc", b"Bearer secret", 200),
        ("/health", None, 200),
    ],
)
def test_a_local_vllm_server_asks_for_the_key_on_every_route(monkeypatch, path, authorization, status):
    """Its own check leaves those open by which weights are loaded."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    guard = importlib.util.spec_from_file_location("vllm_guard", LAUNCHER.parent / "vllm_guard.py")
    module = importlib.util.module_from_spec(guard)
    guard.loader.exec_module(module)
    sent = []

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = [(b"accept", b"*/*")] + ([] if authorization is None else [(b"authorization", authorization)])
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(module.RequireKey(app)(scope, None, send))
    assert sent[0]["status"] == status


# --- attached servers -------------------------------------------------------------------------------------------------


def test_attached_servers_and_their_router_get_the_key_that_the_user_exports(build, serve, model, monkeypatch, flavour):
    monkeypatch.setenv("KEY_OF_SERVERS", "secret\n")
    fakes = [serve(flavour, key="secret") for _ in range(2)]
    settings = {"servers": [fake.url for fake in fakes], "api_key_variable": "KEY_OF_SERVERS"}
    engine = build(flavour, serve_loaded=False, **settings)
    engine.update_weights(model.named_parameters(), 1)
    assert works(engine)
    router = serve(flavour, key="secret")
    router.version = fakes[0].version = fakes[1].version = "default"
    assert works(build(flavour, router=router.url, **settings)) and router.generations == len(PROMPTS)


@pytest.mark.parametrize(("exported", "given"), [("wrong", "secret"), (None, "secret"), ("secret", "admins")])
def test_a_refused_key_is_one_error_at_once(build, serve, monkeypatch, flavour, exported, given):
    """Not a server that is still starting, for which it would wait."""
    fake = serve(flavour, key=given)
    settings = {"servers": [fake.url]}
    if exported is not None:
        monkeypatch.setenv("KEY_OF_SERVERS", exported)
        settings["api_key_variable"] = "KEY_OF_SERVERS"
    with pytest.raises(EngineError, match=r"status 401 \(its API key: see rollout.api_key_variable\)") as refused:
        build(flavour, **settings)
    assert "given up" not in str(refused.value) and left_alone(fake)


def test_a_key_that_is_not_exported_is_named(monkeypatch):
    monkeypatch.delenv("KEY_OF_SERVERS", raising=False)
    config = RolloutConfig(engine="sglang", servers=["http://localhost:1"], api_key_variable="KEY_OF_SERVERS")
    with pytest.raises(ConfigError, match="rollout.api_key_variable: the environment variable KEY_OF_SERVERS is not"):
        check_servers(config, trainer=False)
    monkeypatch.setenv("KEY_OF_SERVERS", "secret")
    check_servers(config, trainer=False)
    assert "secret" not in config.model_dump_json()


# --- the process group of a sync --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sync_timeout_s", [5, 600])
def test_the_groups_own_timeout_lies_beyond_a_steps_deadline(build, serve, model, monkeypatch, sync_timeout_s):
    """And beyond the grace for the other servers: when NCCL's passes, it ends the trainer."""
    timeouts = []

    class Group(distributed_transport.SenderGroup):
        def __init__(self, *args):
            super().__init__(*args)
            timeouts.append((self._timeout.total_seconds(), self._store.timeout.total_seconds()))

    monkeypatch.setattr(distributed_transport, "SenderGroup", Group)
    settings = {"weight_sync": "distributed", "sync_timeout_s": sync_timeout_s, "restarts": 0}
    engine = build("sglang", serve_loaded=False, servers=[serve("sglang").url], **settings)
    with pytest.raises(EngineError, match="joins no group"):
        engine.update_weights(model.named_parameters(), 1)
    step_s = engine._control.step_s
    assert step_s == min(sync_timeout_s, 120) and timeouts
    assert all(min(pair) > step_s + distributed_transport._GRACE_S for pair in timeouts)

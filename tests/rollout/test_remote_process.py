"""Servers as child processes: started, restarted when they die, ended with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote import client, replica
from real_megatron.rollout.remote.process import LAUNCHER, ServerProcess
from real_megatron.rollout.sglang.engine import SGLangEngine
from tests.support.rollout_fake_server import FAKE, VOCABULARY, expected_ids, python_that_runs
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec

ROOT = Path(__file__).parents[2]
CONFIG = tiny_qwen3(VOCABULARY, max_position_embeddings=64)
PROMPTS = [[i, i + 1, 5] for i in range(1, 20)]
PARAMS = SamplingParams(n=2, max_new_tokens=8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(replica, "_POLL_S", 0.05)


@pytest.fixture
def build(tmp_path):
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(tmp_path / "model")
    engines = []

    def make(body: str = FAKE, **settings):
        settings = {"weight_sync": "disk"} | settings
        config = RolloutConfig(engine="sglang", python=python_that_runs(tmp_path, body), **settings)
        engine = SGLangEngine(engine_spec(config, tmp_path / "model", tmp_path / "work"))
        engines.append(engine)
        engine.update_weights(model.named_parameters(), 1)
        return engine

    yield make
    for engine in engines:
        engine.close()


def check(groups):
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert [r.token_ids for r in group] == [expected_ids(prompt, k, 6) for k in range(2)]
        assert {r.weight_version for r in group} == {1}


def processes(engine):
    return [r.process for r in engine._pool.replicas]


def test_a_killed_server_is_restarted_with_the_current_weights(build):
    engine = build(replicas=2)
    first, second = processes(engine)
    check(engine.generate(PROMPTS, PARAMS))
    for _ in range(2):
        engine._loop.run(engine._pool.settled())
        os.kill(first.pid, signal.SIGKILL)
        os.kill(second.pid, signal.SIGKILL)
        check(engine.generate(PROMPTS, PARAMS))
    engine._loop.run(engine._pool.settled())  # one of them may have served alone
    assert first.starts >= 2 and second.starts >= 2
    logs = sorted(path.name for path in first.log.parent.iterdir())
    assert {"sglang-0.0.log", "sglang-0.1.log", "sglang-1.0.log"} <= set(logs)
    assert "fake server on port" in first.log.read_text()


def test_killed_in_mid_batch(build):
    engine = build(concurrency=2)
    (process,) = processes(engine)
    results = engine.generate_stream(PROMPTS, PARAMS)
    groups = dict([next(results)])
    os.kill(process.pid, signal.SIGKILL)
    for index, group in results:
        assert index not in groups
        groups[index] = group
    check([groups[i] for i in range(len(PROMPTS))])


def test_a_stopped_server_is_replaced(build, monkeypatch):
    """Not dead, but answering nothing: the health check misses its deadline and the process is started anew."""
    monkeypatch.setattr(replica, "_PROBE_S", 3)
    engine = build(timeout_s=3, attempts=10)
    (process,) = processes(engine)
    os.kill(process.pid, signal.SIGSTOP)
    stopped = process.pid
    check(engine.generate(PROMPTS, PARAMS))
    assert process.pid != stopped and process.starts >= 2


def test_a_server_that_cannot_start_is_one_error_with_the_end_of_its_log(build):
    with pytest.raises(EngineError, match="(?s)given up after 1 recoveries in a row.*exit status 3.*no such device"):
        build(
            """
            import sys
            print("no such device")
            sys.exit(3)
        """,
            restarts=1,
        )


def test_a_server_inherits_nothing_of_torchrun_and_leaves_a_log_of_its_own(tmp_path, monkeypatch):
    """As under torchrun: a server that inherits these waits for the store of a world that is not its own."""
    world = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    world += ("ROLE_RANK", "ROLE_NAME", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID")
    for name in world:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "2")
    command = [sys.executable, "-c", "import os; print(*sorted(os.environ), flush=True)"]
    for start in range(2):
        process = ServerProcess(command, tmp_path, "server", {"ADDED": "3"})
        process.start()
        process._process.wait()
        assert process.log == tmp_path / f"server.{start}.log"
        names = set(process.log.read_text().split())
        assert {"KEPT", "ADDED", "PATH", "SPT_NOENV"} <= names and not names & set(world)
        process.close()


def test_a_missing_python_is_named(tmp_path):
    process = ServerProcess(["/no/such/python", "x"], tmp_path, "server-0")
    with pytest.raises(EngineError, match=r"cannot start server-0: /no/such/python \(rollout.python\): No such file"):
        process.start()


def test_a_server_that_dies_at_every_request_is_given_up(build):
    """A request that kills servers must not restart them for ever."""
    dies = "import os\n    from tests.support.rollout_fake_server import FakeServer\n"
    dies += "    FakeServer.generate = lambda *_: os._exit(1)\n    main()"
    engine = build(FAKE.replace("main()", dies, 1), restarts=2, attempts=20)
    (process,) = processes(engine)
    with pytest.raises(EngineError, match="given up after 2 recoveries|failed 20 times"):
        engine.generate(PROMPTS, PARAMS)
    assert process.starts <= 30


def test_close_ends_the_whole_process_group(build):
    engine = build()
    (process,) = processes(engine)
    pid = process.pid
    engine.close()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_closed_process_is_not_started_again(tmp_path):
    """A recovery that is still under way when the engine closes must not leave a server behind."""
    process = ServerProcess([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, "server-0")
    process.start()
    pid = process.pid
    process.close()
    process.start()
    assert process.pid is None and process.starts == 1 and not process.alive()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_a_server_under_the_launcher_can_fork(tmp_path):
    (tmp_path / "forks.py").write_text(
        "import multiprocessing\n"
        "child = multiprocessing.get_context('fork').Process(target=print, args=('forked',))\n"
        "child.start()\n"
        "child.join()\n"
    )
    server = subprocess.Popen(
        [sys.executable, LAUNCHER, "forks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
    )
    try:
        assert server.wait(120) == 0 and server.stdout.read() == b"forked\n"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        server.stdin.close()
        server.stdout.close()


def test_the_launcher_ends_the_server_when_the_parent_dies(tmp_path):
    """The parent is killed outright; the server, which the launcher runs as a module, must follow."""
    (tmp_path / "endless.py").write_text("import time\nprint('up', flush=True)\nwhile True: time.sleep(1)\n")
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import sys, time
            sys.path.insert(0, {str(ROOT)!r})
            from pathlib import Path
            from real_megatron.rollout.remote.process import ServerProcess
            server = ServerProcess([sys.executable, {str(LAUNCHER)!r}, "endless"], Path({str(tmp_path)!r}), "server")
            server.start()
            print(server.pid, flush=True)
            time.sleep(60)
        """)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    while "up" not in (tmp_path / "server.0.log").read_text():
        time.sleep(0.01)
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        # An orphan that nobody has reaped yet still has its number.
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the server outlived its parent")

"""The tiny judge on three hosts: two train with two gloo ranks each, one serves rollouts with a real SGLang server. One
training host is cut off in the middle of a step and comes back (tests/run.sh --sglang --hosts)."""

from pathlib import Path

import psutil
import pytest
from transformers import AutoModelForCausalLM

from real_megatron.rollout.sglang.router import router_installed
from tests.support.hosts import Hosts
from tests.support.launches import Launch
from tests.support.served_runs import served_config, uneven_task
from tests.support.tiny_runs import rows

pytestmark = pytest.mark.sglang

STEPS = 4


def test_a_run_with_a_rollout_host_survives_the_loss_of_a_training_host(
    hosts: Hosts, sglang_python: str, tmp_path: Path
) -> None:
    task = uneven_task(tmp_path / "task")
    config = served_config(
        "sglang",
        task,
        tmp_path / "run",
        steps=STEPS,
        rollout={"python": sglang_python},
        checkpoint={"save_hf": True, "every": 1},
    )
    routed = router_installed(config.rollout)
    serving = f"h3 slots=1 role=rollout router={'on' if routed else 'off'}"
    hostfile = hosts.write(tmp_path / "hosts", "h1 slots=2", "h2 slots=2", serving)
    seen: dict[int, str] = {}
    with Launch(hosts, hostfile, config, tmp_path, "--no-preflight", "--max-restarts", "1") as launch:
        launch.until(lambda: launch.steps() >= 1)
        seen = launch.left()
        environments = {"\0".join(psutil.Process(pid).environ().values()) for pid in list(seen)}
        hosts.cut("h2")
        try:
            launch.until(lambda: not hosts.processes("h2"))
            launch.until(lambda: "when all hosts answer" in launch.log.read_text())
        finally:
            hosts.join("h2")
        assert launch.wait() == 0, launch.text()
        launch.nothing_left_within(5)
    # Each step once, with all its responses: what the lost start had done since its checkpoint is done anew. SGLang's
    # sampling has no seeds, so that responses are not those of an undisturbed run; test_ssh.py compares bits.
    trained = rows(config.output)
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert all(row["rollout/small_groups"] == 0 for row in trained)
    AutoModelForCausalLM.from_pretrained(config.output / "hf")
    assert any("start_router" in text for text in seen.values()) == routed
    # The server's key stands where only its owner reads it.
    server = next(text for text in seen.values() if "sglang.launch_server" in text)
    assert "--host " + hosts.address("h3") in server
    key = next(value for values in environments for value in values.split("\0") if len(value) == 64)
    assert not any(key in text for text in seen.values())
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]

"""What each host of a launch runs: composed from the host file and the configuration, and by which script."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from real_megatron.cluster import node
from real_megatron.cluster.hostfile import Host
from real_megatron.cluster.node import node_command
from real_megatron.errors import ConfigError
from real_megatron.rollout import rollout_hosts
from real_megatron.rollout.rollout_hosts import servers_of
from tests.support.tiny_runs import tiny_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples/launch"
HOSTS = [Host("n1", 2), Host("n2", 2), Host("n3", 8, "rollout")]
ADDRESSES = ["10.0.0.9", "10.0.0.2", "10.0.0.3"]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether sglang-router is installed; it is not unless a test says so."""

    def say(there: bool) -> None:
        for module in (node, rollout_hosts):
            monkeypatch.setattr(module, "router_installed", lambda _: there)

    say(False)
    return say


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run whose servers take four GPUs each."""
    for name, value in {"PYTHON": "python", "LOGS": "logs", "RUN_ID": "7-0", "STOP_SECONDS": "25"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "real.yaml"
    run = tiny_config(tmp_path, tmp_path / "run", rollout={"engine": "sglang", "tensor": 4})
    path.write_text(run.to_yaml(), encoding="utf-8")
    return str(path)


def test_training_hosts_meet_at_the_first_and_attach_to_all_servers(config: str) -> None:
    first, second = (node_command(HOSTS, ADDRESSES, i, "train", config, ["steps=2"]) for i in range(2))
    same = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-endpoint=10.0.0.9:29500", "--rdzv-id=7-0", "--max-restarts=0"]
    same += ["rollout.servers=[http://10.0.0.3:30000,http://10.0.0.3:30001]", "steps=2", "--shutdown-timeout=20"]
    same += ["rollout.api_key_variable=REAL_SERVER_KEY"]
    assert set(same) < set(first) and set(same) < set(second)
    assert {"--rdzv-conf=is_host=1", "--local-addr=10.0.0.9", "rollout.sync_host=10.0.0.9"} < set(first)
    assert {"--rdzv-conf=is_host=0", "--local-addr=10.0.0.2", "rollout.sync_host=10.0.0.2"} < set(second)


def test_a_rollout_host_serves_on_its_own_address(config: str) -> None:
    command = node_command(HOSTS, ADDRESSES, 2, "train", config, ["steps=2"])
    assert command == [
        *("python", "-m", "real_megatron.rollout.serve", config, "steps=2"),
        *("--host", "10.0.0.3", "--gpus", "8", "--logs", "logs/n3"),
    ]


def test_one_router_stands_in_front_of_the_servers_of_all_rollout_hosts(
    config: str, installed: Callable[[bool], None]
) -> None:
    installed(True)
    hosts, addresses = [*HOSTS, Host("n4", 4, "rollout")], [*ADDRESSES, "10.0.0.4"]
    commands = [node_command(hosts, addresses, i, "train", config, []) for i in range(4)]
    urls = ["http://10.0.0.3:30000", "http://10.0.0.3:30001", "http://10.0.0.4:30000"]
    assert all("rollout.router=http://10.0.0.3:29990" in command for command in commands[:2])
    assert commands[2][commands[2].index("--router") + 1 :] == urls
    assert "--router" not in commands[3]


@pytest.mark.parametrize(
    ("router", "slots", "overrides", "there", "used"),
    [
        ("", 8, [], True, True),
        ("", 8, [], False, False),
        ("", 4, [], True, False),
        ("", 8, ["rollout.engine=vllm"], True, False),
        ("", 8, ["rollout.router=http://mine:1"], True, False),
        ("off", 8, [], True, False),
        ("on", 4, [], True, True),
    ],
)
def test_a_router_is_used_where_it_is_installed_and_of_use_or_asked_for(
    router: str,
    slots: int,
    overrides: list[str],
    there: bool,
    used: bool,
    config: str,
    installed: Callable[[bool], None],
) -> None:
    installed(there)
    hosts = [Host("n1", 1), Host("n2", slots, "rollout", router=router)]
    trains, serves = (node_command(hosts, ADDRESSES[:2], i, "train", config, overrides) for i in range(2))
    assert ("rollout.router=http://10.0.0.2:29990" in trains) == used
    assert ("--router" in serves) == used


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"router=on, but .* cannot import sglang_router: install sglang-router there"),
        (["rollout.engine=vllm"], r"router=on is for rollout.engine=sglang, and it is vllm: remove it"),
        (["rollout.router=http://mine:1"], r"router=on starts a router, and rollout.router names another"),
    ],
)
def test_a_router_that_cannot_be_had_ends_the_launch(overrides: list[str], message: str, config: str) -> None:
    hosts = [Host("n1", 1), Host("n2", 8, "rollout", router="on")]
    with pytest.raises(ConfigError, match=message):
        node_command(hosts, ADDRESSES[:2], 1, "train", config, overrides)


def test_without_rollout_hosts_the_engine_is_the_configurations_own(config: str) -> None:
    command = node_command(HOSTS[:2], ADDRESSES[:2], 0, "sft", config, [])
    assert not [word for word in command if word.startswith("rollout.")] and command[-2:] == ["sft", config]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"engine": "transformers"}, r"rollout.engine is transformers, which has no servers: set it to sglang or vllm"),
        ({"tensor": 16}, r"rollout.tensor is 16, more than the 8 GPUs of a rollout host: lower it"),
        ({"colocate": True}, r"rollout.colocate: .* switch it off, or give no host role=rollout"),
    ],
)
def test_a_configuration_without_servers_for_rollout_hosts_is_refused(
    override: dict, message: str, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, tmp_path / "run", rollout={"engine": "sglang"} | override)
    with pytest.raises(ConfigError, match=message):
        servers_of(config, 8)


def test_print_shows_all_commands_and_runs_none(config: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=2 address=10.0.0.9 port=2200 user=me\nn3 slots=4 role=rollout address=10.0.0.3\n")
    environment = os.environ | {
        "PYTHON": str(ROOT / ".venv/bin/python"),
        "SSH_OPTIONS": "-F nowhere -o ProxyCommand='ssh -W %h:%p gate'",
        "NCCL_IB_HCA": "mlx5_0 and more",
        "HF_HOME": "/models",
        "HF_TOKEN": "secret",
        "MINE": "7",
        "MY_API_KEY": "secret",
        "FORWARD": "MINE MY_API_KEY",
    }
    shown = subprocess.run(
        ["bash", LAUNCH / "ssh.sh", "--print", "--logs", tmp_path / "logs", hosts, "train", config],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "doctor --cluster" in shown[0]
    assert r" -F nowhere -o ProxyCommand=ssh\ -W\ %h:%p\ gate -o BatchMode=yes" in shown[1]
    assert "-p 2200 -l me n1 cd " in shown[1]
    assert r" NCCL_IB_HCA=mlx5_0\ and\ more " in shown[1] and " HF_HOME=/models " in shown[1] and " MINE=7 " in shown[1]
    assert "secret" not in "".join(shown)
    assert shown[3].startswith("n1 (train):") and "torch.distributed.run" in shown[3]
    assert shown[4].startswith("n3 (rollout):") and "--gpus 4" in shown[4]
    assert not (tmp_path / "logs").exists()


class Slurm:
    """The script with stubs in place of Slurm's commands. `srun` runs its tasks one after the other, the training step
    as number 1. In place of node.sh is `task`, a line of bash."""

    def __init__(self, directory: Path, task: str) -> None:
        tools, self.work = directory / "bin", directory / "work"
        tools.mkdir()
        (self.work / "examples/launch").mkdir(parents=True)
        (self.work / "examples/launch/node.sh").write_text(task + "\n")
        (tools / "scontrol").write_text(
            '#!/bin/bash\n[ "$1" != show ] || printf "%s\\n" a1 a2 a3\n[ "$1" != requeue ] || echo "$*" >>told\n'
        )
        (tools / "scancel").write_text('#!/bin/bash\necho "$*" >>told\n')
        (tools / "srun").write_text(
            '#!/bin/bash\necho "$*" >>sruns\n[[ $* == *nodelist=a1,* ]] && step=1 || step=0\n'
            "while [[ $1 == --* ]]; do [[ $1 != --ntasks=* ]] || n=${1#*=}; shift; done\n"
            'for ((i = 0; i < n; i++)); do SLURM_STEP_ID=$step SLURM_PROCID=$i "$@"; done\n'
        )
        for tool in tools.iterdir():
            tool.chmod(0o755)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "a[1-3]", "SLURM_JOB_ID": "12"}
        environment |= {"SLURM_CPUS_ON_NODE": "96", "LOGS": "logs", "ROUTER": "off"}
        command = ["bash", LAUNCH / "slurm.sbatch", "real.yaml", "steps=3"]
        self.process = subprocess.Popen(command, cwd=self.work, env=environment)

    def lines(self, name: str) -> list[str]:
        file = self.work / name
        return sorted(file.read_text().splitlines()) if file.exists() else []


SERVES = 'if [ "$2" = 2 ]; then for ((t = 0; t < 300; t++)); do [ ! -e end ] || exit 0; sleep 0.1; done; fi'
"""The rollout node's task goes on until told."""


def test_slurm_starts_the_script_on_each_node_with_its_own_number(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, f'echo "${{@:2}} $RUN_ID $STOP_SECONDS ${{#REAL_SERVER_KEY}}" >>tasks; {SERVES}')
    assert slurm.process.wait(60) == 0
    (slurm.work / "end").touch()
    hosts = ["a1 slots=8 role=train", "a2 slots=8 role=train", "a3 slots=8 role=rollout router=off"]
    assert slurm.lines("logs/hosts") == hosts
    assert slurm.lines("tasks") == [f"{i} train real.yaml steps=3 12-0 1140 64" for i in range(3)]
    sruns = [line for line in slurm.lines("sruns") if line.startswith("--")]
    assert "--nodelist=a1,a2 " in sruns[1] and "--nodelist=a3 " in sruns[0]
    assert slurm.lines("told") == []


@pytest.mark.parametrize("refused", [False, True])
def test_before_its_time_is_up_slurm_tells_the_training_step_whatever_its_number(refused: bool, tmp_path: Path) -> None:
    """And the job is queued again, unless its run was refused."""
    refuse = "touch logs/refused;" if refused else ""
    slurm = Slurm(tmp_path, f'{SERVES}; {refuse} while [ ! -e told ]; do sleep 0.1; done; [ "$2" != 0 ] || exit 143')
    deadline = time.monotonic() + 60
    while not (slurm.work / "logs/step-train").exists() or (refused and not (slurm.work / "logs/refused").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    slurm.process.send_signal(signal.SIGTERM)
    assert slurm.process.wait(60) == (0 if refused else 143)
    (slurm.work / "end").touch()
    assert slurm.lines("told") == ["--signal=TERM 12.1", *(["requeue 12"] if not refused else [])]


def test_a_run_under_slurm_ends_with_its_servers(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, '[ "$2" != 2 ] || exit 0; exec sleep 60')
    assert slurm.process.wait(30) == 143  # of the srun that was ended


def test_the_job_of_kubernetes_has_a_pod_a_host_and_ends_with_the_training_pods() -> None:
    settings, service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    hosts = settings["data"]["hosts"].splitlines()
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], spec["completionMode"]) == ("batch/v1", "Indexed")
    assert spec["completions"] == spec["parallelism"] == len(hosts)
    assert [line.split()[0] for line in hosts] == [f"real-{i}.{service['metadata']['name']}" for i in range(len(hosts))]
    training = [i for i, line in enumerate(hosts) if "role=rollout" not in line]
    assert spec["successPolicy"]["rules"] == [{"succeededIndexes": f"0-{training[-1]}"}]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert pod["restartPolicy"] == "Never" and pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    container = pod["containers"][0]["name"]
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": [4]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    subprocess.run(["bash", "-n"], input=pod["containers"][0]["args"][0], text=True, check=True)


def test_a_run_that_is_refused_has_a_status_of_its_own(config: str, tmp_path: Path) -> None:
    """By which Kubernetes knows that starting it again would not help."""
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=1 address=127.0.0.1\n")
    environment = os.environ | {"PYTHON": str(ROOT / ".venv/bin/python"), "LOGS": str(tmp_path / "logs")}
    command = ["bash", LAUNCH / "node.sh", hosts, "0", "train", config]
    refused = subprocess.run(
        [*command, "optimizer.lrr=1"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 4 and "unknown key `optimizer.lrr`" in refused.stderr
    assert "unknown key" in (tmp_path / "logs/refused").read_text()


def test_a_refusal_of_an_earlier_launch_is_not_this_ones(tmp_path: Path) -> None:
    """A pod may fail, as where its node is sick, before that of host 0 has removed the file."""
    hosts, refused = tmp_path / "hosts", tmp_path / "logs/refused"
    hosts.write_text("n1 slots=1 address=127.0.0.1\nn2 slots=1 address=127.0.0.2\n")
    refused.parent.mkdir()
    refused.write_text("of yesterday")
    environment = os.environ | {"PYTHON": "false", "LOGS": str(refused.parent)}
    command = ["bash", LAUNCH / "node.sh", hosts, "1", "train", "real.yaml"]
    assert subprocess.run(command, env=environment, check=False).returncode == 1
    assert refused.exists(), "it is host 0 that removes it"
    environment["PYTHON"] = str(tmp_path / "refuses")
    (tmp_path / "refuses").write_text('#!/bin/bash\necho "of today" >"$REFUSED"\nexit 1\n')
    (tmp_path / "refuses").chmod(0o755)
    assert subprocess.run(command, env=environment, check=False).returncode == 4

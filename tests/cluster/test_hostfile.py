"""The host file: what it says, and what is said of a wrong one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from real_megatron.cluster.hostfile import Host, main, read_hosts, with_addresses
from real_megatron.errors import ConfigError

GOOD = """
# three hosts
node1 slots=8
node2.example.org slots=4 address=10.0.0.2 role=train   # the second

node3 user=me role=rollout slots=2 port=2222 router=off
"""


def written(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_every_setting_is_read(tmp_path: Path) -> None:
    assert read_hosts(written(GOOD, tmp_path)) == [
        Host("node1", 8),
        Host("node2.example.org", 4, "train", "10.0.0.2"),
        Host("node3", 2, "rollout", "", 2222, "me", "off"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "hosts: no training host: add a line such as `node1 slots=8`"),
        ("a slots=1 role=rollout", "hosts: no training host"),
        ("a slots=1\n# b\na slots=2", "hosts:3: a stands there twice (first on line 1): keep one line"),
        ("a slots=1 address=10.0.0.1\nb slots=1 address=10.0.0.1", "hosts:2: 10.0.0.1 stands there twice"),
        ("10.0.0.1 slots=1\nb slots=1 address=10.0.0.1", "hosts:2: 10.0.0.1 stands there twice"),
        ("a", "hosts:1: a has no slots: add slots=N"),
        ("a slots=0", "hosts:1: slots=0: must be a whole number of at least 1"),
        ("a slots=-1", "hosts:1: slots=-1: must be"),
        ("a slots=8x", "hosts:1: slots=8x: must be"),
        ("a slots=²", "hosts:1: slots=²: must be"),
        ("a slots=1 port=65536", "hosts:1: port=65536: must be a whole number of at least 1, at most 65535"),
        ("a slots=1 slots=2", "hosts:1: `slots` is set twice"),
        ("a slot=8", "hosts:1: unknown key `slot`; did you mean `slots`?"),
        ("a gpus=8", "hosts:1: unknown key `gpus`; known keys: slots, role, address, port, user, router"),
        ("a slots = 8", "hosts:1: `slots` has no value: write it as slots=VALUE, without spaces"),
        ("a slots=1 role=rolout", "hosts:1: role=rolout: there is no such role; did you mean `rollout`?"),
        ("a slots=1 role=x", "hosts:1: role=x: there is no such role; use one of train, rollout"),
        ("a slots=1 address=b", "hosts:1: address=b: name an IPv4 address, such as 10.0.0.1"),
        ("a slots=1 user=-oProxyCommand=x", "hosts:1: user=-oProxyCommand=x: is no name of a user"),
        ("a slots=1 role=rollout router=yes", "hosts:1: router=yes: use one of on, off"),
        ("a slots=1 router=on", "hosts:1: router=on: set it on the first host with role=rollout, and only there"),
        ("a slots=1 role=rollout\nb slots=1 role=rollout router=on", "hosts:2: router=on: set it on the first host"),
        ("-oProxyCommand=x slots=1", "hosts:1: '-oProxyCommand=x' is no name of a host"),
        ("slots=8", "hosts:1: 'slots=8' is no name of a host"),
    ],
)
def test_a_fault_is_named_with_its_line_and_the_fix(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_hosts(written(text, tmp_path))
    assert said in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the host file"):
        read_hosts(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the host file"):
        read_hosts(tmp_path / "binary")


def test_addresses_are_those_that_other_hosts_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"a": "10.0.0.1", "b": "127.0.1.1"}

    def look_up(name: str) -> str:
        if name not in known:
            raise socket.gaierror("unknown")
        return known[name]

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    assert with_addresses([Host("a", 1), Host("b", 1, address="10.0.0.2")]) == ["10.0.0.1", "10.0.0.2"]
    assert with_addresses([Host("b", 1)]) == ["127.0.1.1"]  # alone
    with pytest.raises(ConfigError, match=r"b: its address is 127.0.1.1, at which no other host reaches it: add addr"):
        with_addresses([Host("a", 1), Host("b", 1)])
    with pytest.raises(ConfigError, match=r"c: its address is not known \(unknown\): add address=IP"):
        with_addresses([Host("c", 1)])


def test_scripts_get_one_line_a_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a slots=8 address=10.0.0.1\nb slots=2 address=10.0.0.2 role=rollout user=me port=23"
    path = written(text, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "real_megatron.cluster.hostfile", path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a 8 train 10.0.0.1 - -\nb 2 rollout 10.0.0.2 23 me\n"
    assert main([str(written("a", tmp_path))]) == 1
    assert "hosts:1: a has no slots" in capsys.readouterr().err
    assert main([]) == 2

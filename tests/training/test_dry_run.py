"""A dry run finds what a run would stumble over, with the same message, and says what the run would do."""

import json
import math
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from real_megatron.config import RunConfig
from real_megatron.data.byte_model import make_byte_model
from real_megatron.errors import ConfigError, UserError
from real_megatron.hardware import find_gpu
from real_megatron.locks import only_writer
from real_megatron.planning.activations import ActivationBytes
from real_megatron.planning.memory import GIB, LayoutMemory, RankMemory
from real_megatron.policy.meta import StateBytes
from real_megatron.rollout.remote.ports import free_ports
from real_megatron.training import dry_run as module
from real_megatron.training import preparation, session
from real_megatron.training.checkpoints import CheckpointStore
from real_megatron.training.dry_run import DryRun, dry_run, trainers_of_a_node
from real_megatron.training.examples import prompt_groups
from real_megatron.training.session import Session
from tests.support.rollout_fake_server import FakeServer

pytestmark = pytest.mark.usefixtures("no_process_group")
H100 = find_gpu("H100")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Any:
    """run(overrides): REAL on ten prompts of ten bytes."""
    rows = [{"prompt": f"is it {i:03}?", "label": i % 2, "cot": "so" * i} for i in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "label": 1}\n{"prompt": "b"\n')
    (tmp_path / "template.txt").write_text("{absent}")
    base = [f"model.path={model}", f"output={tmp_path}/run", f"data.train.0.path={tmp_path}/train.jsonl"]
    base += ["scale.scores=['0', '1']", "batch.prompts=4", "rollout.n=2", "steps=6", "batch.max_tokens=100"]
    base += ["data.max_response_tokens=20"]
    return lambda *overrides: RunConfig.from_yaml(None, [*base, *overrides])


@pytest.fixture
def taken() -> Iterator[int]:
    """A port in use."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=2"], "does not divide the 3 ranks of this run"),
        (["parallel.tensor=3"], "parallel.tensor = 3 does not divide the model's 4 attention heads"),
        (["parallel.pipeline=3"], "does not divide the model's 2 layers"),
        (["scale.anchor=' '"], "scale.anchor: the anchor ' ' has no visible character"),
        (["data.train.0.path=absent.jsonl"], "absent.jsonl"),
        (["data.train.0.path=TMP/bad.jsonl"], "bad.jsonl, line 2: not valid JSON"),
        (["output=TMP/train.jsonl/run"], "run cannot be a directory, since "),
        (["optimizer.warmup_steps=6"], "optimizer.warmup_steps = 6 must be less than the run's 6 optimizer updates"),
        (["epochs=1", "optimizer.warmup_steps=3"], "must be less than the run's 3 optimizer updates"),
        (["rollout.engine=sglang", "rollout.python=PYTHON", "rollout.port=TAKEN"], "rollout.port: port "),
        (["rollout.engine=sglang", "rollout.python=/no/python"], "rollout.python: /no/python is not there"),
        (["data.eval.dev.path=absent.jsonl"], "absent.jsonl"),
        (["data.max_response_tokens=50000"], "has a prompt of 10 tokens, and a response may have 50000"),
        (["data.template=TMP/template.txt"], "needs 'absent', the record has"),
        (["metrics.wandb_project=x"], "wandb is not installed"),
        (["model.path=nowhere"], "model.path: nowhere: no such directory"),
    ],
)
def test_what_is_wrong_has_the_message_of_the_run(
    overrides: list[str], message: str, run: Any, tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three ranks. What is no fault of the data ends the run before its ranks meet."""
    places = {"TMP": str(tmp_path), "PYTHON": sys.executable, "TAKEN": str(taken)}
    for name, place in places.items():
        overrides = [override.replace(name, place) for override in overrides]
    config = run(*overrides)
    with pytest.raises(UserError) as dry:
        dry_run(config, "train", 3, H100)
    assert message in str(dry.value)
    monkeypatch.setenv("WORLD_SIZE", "3")
    met: list[int] = []
    monkeypatch.setattr(session, "join_torchrun", met.append)
    with pytest.raises(type(dry.value)) as real:
        Session(config, prompt_groups)
    assert str(real.value) == str(dry.value)
    assert bool(met) == any(override.startswith(("data.", "epochs=")) for override in overrides)


def test_objectives_are_checked_as_by_their_commands(run: Any) -> None:
    with pytest.raises(ConfigError, match="use `real-megatron train`"):
        dry_run(run(), "sft", 1, H100)
    with pytest.raises(ConfigError, match="use `real-megatron sft`"):
        dry_run(run("objective.name=raft"), "train", 1, H100)
    with pytest.raises(ConfigError, match=r"rollout\.top_p is 0\.9"):
        dry_run(run("rollout.top_p=0.9"), "train", 1, H100)


def shown(found: DryRun, section: str) -> dict[str, str]:
    return dict(found.sections[section])


def test_it_says_what_the_run_would_do_and_leaves_nothing_behind(run: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    changes = ["data.eval.dev.path=" + str(tmp_path / "train.jsonl"), "evaluation.every=4", "checkpoint.every=5"]
    found = dry_run(run("parallel.tensor=2", "data.max_prompt_tokens=10", *changes), "train", 4, H100)
    assert sorted(tmp_path.rglob("*")) == before and not dist.is_initialized()
    assert found.title == "train on 4 H100: TP 2, DP 2" and not found.warnings
    assert shown(found, "data")["training"] == (
        "10 examples (0 dropped, 0 cut), prompts of 10 tokens on average, 10 at most"
    )
    assert shown(found, "data")["schedule"] == "6 steps of 4 prompts, 6 optimizer updates"
    # A group has 10 + 2 × 20 tokens, or 10 + 2 × 10: two, or three, fit into 100.
    batches = shown(found, "micro-batches")
    assert list(batches) == ["responses of 20", "responses of 10"]
    assert batches["responses of 20"].startswith("1 a data-parallel rank, 200 tokens in all, imbalance 0.0 %; ")
    assert "the longest has 100 tokens, batch.max_tokens is 100" in batches["responses of 20"]
    assert "the longest has 60 tokens" in batches["responses of 10"]
    phases = shown(found, "phases")
    assert phases["rollout"].startswith("4 requests of 2 responses: at most 160 tokens; requests a rank: 1, ")
    assert phases["evaluation"] == (
        "dev: 10 × 1 response; before the first step, every 4 steps and at the end (3 times)"
    )
    assert "every 5 steps and at the end (2 times); 2 kept" in phases["checkpoint"]
    assert phases["export"].endswith("run/hf") and "log-probs" not in phases


def test_long_examples_are_counted(run: Any) -> None:
    found = dry_run(run("data.max_prompt_tokens=10", "batch.max_tokens=25"), "train", 1, H100)
    assert found.warnings == [
        "batch.max_tokens is 25: 10 of 10 examples with one response are longer (up to 30 tokens) and make longer "
        "micro-batches: raise it to plan for them"
    ]
    batches = shown(found, "micro-batches")
    # Each group is split into its two responses, which run twice: for their rewards first. 240 tokens make ten
    # micro-batches of 25, of which two stay empty.
    assert batches["responses of 20"].startswith("10 a data-parallel rank, 480 tokens in all")
    for text in batches.values():
        assert text.endswith("batch.max_tokens is 25; 4 of 4 groups are longer and split")
    assert "the longest has 30 tokens" in batches["responses of 20"]


def test_scores_of_several_tokens_are_shown_with_what_their_branches_add(run: Any) -> None:
    """`1` is the beginning of `10`: one token more for each response. 4 groups of 10 + 2 · 21 tokens."""
    found = dry_run(run("scale.scores=['0', '1', '10']", "data.max_prompt_tokens=10"), "train", 1, H100)
    assert shown(found, "data")["scale"] == (
        "anchor '[RESULT] ': 9 tokens; scores as tokens: '0' 48, '1' 49, '10' 49 48; their branches add 1 token a "
        "response"
    )
    batches = shown(found, "micro-batches")
    assert batches["responses of 20"].startswith("4 a data-parallel rank, 208 tokens in all")
    small = run("scale.scores=['0', '1', '10']", "data.max_prompt_tokens=10", "batch.max_tokens=25")
    assert "(up to 31 tokens)" in dry_run(small, "train", 1, H100).warnings[0]


def test_supervised_training_shows_its_own_responses(run: Any) -> None:
    """Of which the longest have 10 + 9 characters of critique, line break, anchor, score and end."""
    config = run("objective.name=raft", "data.max_response_tokens=25", "model.dtype=float32")
    found = dry_run(config, "sft", 2, H100)
    data = shown(found, "data")["training"]
    assert data.startswith("7 examples (3 dropped, 0 cut), ") and data.endswith(" 24 at most")
    assert list(shown(found, "micro-batches")) == ["steps 1 to 3"] and "servers" not in found.sections
    assert "1" == shown(found, "phases")["update"].rpartition(": ")[2]


def test_weights_need_not_be_there_but_are_missed(run: Any, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = dry_run(run(f"model.path={bare}"), "train", 1, H100)
    assert found.warnings == [f"model.path: {bare} holds no weights, which the run itself would not start without"]
    assert shown(dry_run(run(), "train", 1, H100), "files")["model"] == f"{model}: 24 tensors, all there"


def test_an_output_that_is_full_used_or_read_only_is_found(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^output: /proc/run cannot be written: "):
        dry_run(run("output=/proc/run"), "train", 1, H100)
    output = tmp_path / "run"
    with only_writer(output, inside=True), pytest.raises(ConfigError, match="is being written by another job"):
        dry_run(run(), "train", 1, H100)
    assert not list(output.iterdir())
    monkeypatch.setattr(module, "disk_usage", lambda _: SimpleNamespace(free=10))
    needed = []
    for keep, there in ((2, 0), (2, 1), (5, 9)):
        monkeypatch.setattr(CheckpointStore, "count", lambda _, there=there: there)
        found = dry_run(run(f"checkpoint.keep={keep}", "checkpoint.save_hf=false"), "train", 1, H100)
        needed.append(shown(found, "files")["disk"].partition(" ")[0])
        warned = ["where 0.0 kB are free: choose another file system, or lower" in text for text in found.warnings]
        assert warned == [True] * (there < 9)
    assert needed == ["3", "2", "0"]


def test_servers_get_gpus_of_a_node(run: Any) -> None:
    def planned(world: int, *overrides: str) -> DryRun:
        local = ["rollout.engine=sglang", f"rollout.python={sys.executable}", *overrides]
        return dry_run(run(*local), "train", world, H100)

    found = planned(4, "rollout.first_gpu=4", "rollout.replicas=2", "rollout.tensor=2")
    servers = shown(found, "servers")
    assert servers["sglang"].startswith("2 started by the run, ") and servers["ports"] == "chosen then"
    assert servers["GPUs"] == "4 to 7 of rank 0's node, 2 a server: their own"
    assert shown(found, "phases")["weight sync"].partition("to ")[2].startswith("2 servers by a broadcast ")
    with pytest.raises(ConfigError, match="do not fit into the 8 GPUs of this node"):
        planned(4, "rollout.first_gpu=4", "rollout.replicas=5")
    with pytest.raises(ConfigError, match="are also those of the 5 training ranks of this node"):
        planned(5, "rollout.first_gpu=4")
    colocated = planned(16, "rollout.colocate=true", "rollout.replicas=8")
    assert "through shared memory" in shown(colocated, "phases")["weight sync"]


def test_ranks_leave_the_servers_gpus_free_where_they_need_several_nodes(run: Any) -> None:
    local = run("rollout.engine=sglang", "rollout.first_gpu=4")
    assert [trainers_of_a_node(local, world, H100) for world in (4, 8, 16, 18)] == [4, 8, 4, 8]
    assert trainers_of_a_node(local.with_overrides(["rollout.colocate=true"]), 16, H100) == 8


def test_attached_servers_are_asked_whether_they_are_there(run: Any) -> None:
    with FakeServer() as server, FakeServer() as ill:
        ill.paused = True
        urls = [server.url, f"http://127.0.0.1:{free_ports(1)[0]}", ill.url]
        found = dry_run(run("rollout.engine=sglang", f"rollout.servers={urls}"), "train", 1, H100)
    lines = [text for _, text in found.sections["servers"]]
    assert lines == [f"{urls[0]} answers", f"{urls[1]} does not answer now", f"{urls[2]} does not answer now"]
    (warning,) = found.warnings
    assert warning.startswith("rollout.servers: 2 of 3 do not answer now (the run waits 900 s for them): " + urls[1])


def test_of_a_model_on_the_hub_weights_are_not_downloaded(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    bare = tmp_path / "snapshot"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(preparation, "checkpoint_directory", lambda *of: asked.append(of) or bare)
    found = dry_run(run("model.path=owner/name"), "train", 1, H100)
    assert asked == [("owner/name", None, False)] and not found.warnings
    assert shown(found, "files")["model"] == "owner/name: weights are not downloaded yet; the run does it"


def test_memory_is_that_of_a_full_micro_batch(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the token budget, or of the longest prompt with one response."""
    asked = []
    real = module.run_memory
    monkeypatch.setattr(module, "run_memory", lambda *of: asked.append(of) or real(*of))
    for budget, tokens in ((110, 110), (25, 30)):
        found = dry_run(run(f"batch.max_tokens={budget}", "parallel.pipeline=2"), "train", 4, H100)
        (_, layout, size, count, gpu, _) = asked.pop()
        # Of a group of 10 + 2 × 20 tokens each response has a row for each token and one for its score; of half a
        # group two thirds.
        assert (layout.world, layout.model.dtype, gpu) == (4, "bfloat16", H100)
        assert size.tokens == tokens and size.rows == math.ceil(tokens * (42 / 50 if budget == 110 else 21 / 30))
        assert count == (5 if budget == 25 else 1)
        assert list(shown(found, "memory")) == ["stage 0", "stage 1"]


@pytest.mark.parametrize("part", [*module._REMEDIES])
def test_memory_that_is_short_is_a_warning_that_names_the_part(
    part: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = 75 * GIB
    states = {name: large * (part == name) for name in ("weights", "gradients", "optimizer")}
    activations = ActivationBytes(large * (part == "activations"), 0, 0, 0, 0)
    server, engine = large * (part == "colocated server"), large * (part == "the engine's copy of the model")
    rank = RankMemory(0, StateBytes(**states), activations, 0, server, engine, 70 * GIB)
    monkeypatch.setattr(module, "run_memory", lambda *_: LayoutMemory((rank,)))
    (warning,) = dry_run(run(), "train", 1, H100).warnings
    assert warning.startswith("memory: a GPU of stage 0 needs about 7") and ", of 70 that can be used" in warning
    assert f"most of it is {part}: {module._REMEDIES[part]}" in warning


def test_a_model_that_no_gpu_holds_is_an_error(run: Any) -> None:
    with pytest.raises(ConfigError, match=r"optimizer of a rank of stage 0 take 0\.0 GiB, and H100 has 0: raise"):
        dry_run(run(), "train", 1, replace(H100, memory=1e6))

"""What a run does when something goes wrong, or is asked for that the plain run does not use."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from real_megatron.config import RunConfig
from real_megatron.locks import only_writer
from real_megatron.training import session
from tests.support.host_ranks import error_on_own_host
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import (
    error_of_own_run,
    errors_of_runs,
    lock_during_and_after,
    order_of_work,
    poisoned,
    rows,
    tiny_config,
    train,
    write_tiny_task,
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize("fp32_logits", [True, False])
def test_the_engine_serves_the_model_as_the_policy_computes_it(fp32_logits: bool, monkeypatch) -> None:
    config = RunConfig.from_tree({"model": {"path": "m", "dtype": "bfloat16", "fp32_logits": fp32_logits}})
    specs = []
    monkeypatch.setattr(session, "build_engine", lambda spec, group: specs.append(spec))
    monkeypatch.setattr(session, "host_group", lambda minutes: None)
    policy = SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu")))
    run = SimpleNamespace(config=config, policy=policy, model_dir=Path("m"), tokenizer=None)
    session.Session.start_engine(run)
    assert (specs[0].dtype, specs[0].fp32_logits) == (torch.bfloat16, fp32_logits)


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(world: int, task: Path, tmp_path: Path) -> None:
    config = tiny_config(task, tmp_path, checkpoint={"every": 1}, optimizer={"max_skipped": 0})
    for message, same in run_ranks(world, poisoned, config, 2):
        assert "step 2, rank" in message and "NaN or infinite values in labels" in message
        assert same, "the weights of step 1 must stand"
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_ranks_that_were_started_for_other_runs_are_named(task: Path, tmp_path: Path) -> None:
    """By their configurations, as copies of a file on two hosts; nothing is written."""
    configs = [tiny_config(task, tmp_path / "run", optimizer={"lr": lr}) for lr in (1e-3, 1e-6)]
    for message in run_ranks(2, error_of_own_run, configs):
        assert "rank 1 on " in message and "  optimizer.lr: 1e-06 there, 0.001 on rank 0\n" in message
    assert not list((tmp_path / "run").glob("*"))


def test_hosts_with_other_copies_of_a_file_are_named(task: Path, tmp_path: Path) -> None:
    hosts = [tmp_path / "a", tmp_path / "b"]
    for host, label in zip(hosts, (1, 2), strict=True):
        host.mkdir()
        (host / "train.jsonl").write_text(json.dumps({"prompt": "great movie", "label": label}) + "\n")
    config = tiny_config(task, tmp_path / "run", data={"train": [{"path": "train.jsonl"}]})
    for message in run_ranks(2, error_on_own_host, config, hosts):
        assert re.search(r"rank 1 on .*\n  data.train.0: '\w+' there.*\n  training examples as tokens: '\w+'", message)
    assert not list((tmp_path / "run").glob("*"))


def test_the_next_batch_can_be_sampled_while_this_one_trains(task: Path, tmp_path: Path) -> None:
    changes = {"rollout": {"staleness": 1}, "objective": {"ratio": "truncated_is"}, "evaluation": {"every": 1}}
    changes["data"] = {"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}}
    changes["evaluation"] |= {"bootstrap": 5}
    run_ranks(2, train, tiny_config(task, tmp_path / "stale", **changes))
    stale = rows(tmp_path / "stale")
    assert [row["step"] for row in stale] == [0, 1, 2, 3]
    changes["rollout"] = {"staleness": 0}
    run_ranks(1, train, tiny_config(task, tmp_path / "fresh", **changes))
    fresh = rows(tmp_path / "fresh")
    # The first batch comes from the start weights either way; after it, the stale run's sampler is one update behind.
    assert stale[1]["loss"] == pytest.approx(fresh[1]["loss"], rel=1e-5)
    assert fresh[2]["ratio"] == pytest.approx(1.0, abs=1e-4) and abs(stale[2]["ratio"] - 1.0) > 1e-4


def test_a_sampled_score_is_rolled_out_and_trained_as_every_other_token(task: Path, tmp_path: Path) -> None:
    """Engine and policy agree about every sampled token (fp32, another batch shape), which counts in ratio and KL."""
    changes = {"objective": {"name": "grpo", "no_anchor": "force", "kl": 0.1}, "rollout": {"temperature": 1.3}}
    run_ranks(2, train, tiny_config(task, tmp_path, steps=2, batch={"mini_batches": 2}, **changes))
    for row in rows(tmp_path):
        assert row["valid"] == 1.0 and row["rollout/forced"] > 0 and 0 < row["rollout/off_scale"] < 1
        assert 0 <= row["reward"] <= 1 and "loss_term2" not in row
    # The engine's log-probs are of the weights before the step: the second mini-batch is one update away.
    first = rows(tmp_path)[0]
    assert first["mismatch/mean"] < 0.1 and first["ratio"] == pytest.approx(1.0, abs=0.1)


def test_two_runs_in_one_directory_are_one_too_many(task: Path, tmp_path: Path) -> None:
    """The ranks of one run are one owner: until it ends."""
    data = {"train": [{"path": str(task / "train_sft.jsonl")}]}
    configs = [tiny_config(task, tmp_path, steps=1, objective={"name": name}, data=data) for name in ("real", "raft")]
    with only_writer(tmp_path, inside=True):
        for first, second in run_ranks(2, errors_of_runs, configs):
            assert (
                f"{tmp_path} is being written by another job (process" in first and first.rpartition(":")[2] in second
            )
    assert not list(tmp_path.iterdir())
    assert run_ranks(2, lock_during_and_after, configs[0]) == [(True, False)] * 2
    assert RunConfig.from_yaml(tmp_path / "checkpoints/step-000001/real_megatron.yaml") == configs[0]


def test_each_batch_is_generated_with_the_newest_weights(task: Path, tmp_path: Path) -> None:
    """And a run whose steps are all done starts no engine."""
    config = tiny_config(task, tmp_path, steps=2)
    work = ["start"]
    for step in range(2):
        work += [f"after {step}", f"generate {step}", "update"]
    assert run_ranks(1, order_of_work, config) == [work]
    assert run_ranks(1, order_of_work, config) == [[]]


def test_sft_starts_its_engine_for_the_first_evaluation(task: Path, tmp_path: Path) -> None:
    """Before it, servers or a second model would only take memory."""
    sections = {"objective": {"name": "raft"}, "evaluation": {"bootstrap": 5}, "steps": 2}
    data = {
        "train": [{"path": str(task / "train_sft.jsonl")}],
        "eval": {"dev": {"path": str(task / "test_ood.jsonl")}},
    }
    config = tiny_config(task, tmp_path, data=data, **sections)
    assert run_ranks(1, order_of_work, config) == [["update", "update", "evaluate 2", "start", "after 2", "generate 2"]]


def test_the_policy_can_recompute_the_samplers_log_probs(task: Path, tmp_path: Path) -> None:
    config = tiny_config(
        task,
        tmp_path,
        steps=1,
        batch={"mini_batches": 2, "old_logprobs": "policy"},
        objective={"ratio": "ppo"},
    )
    run_ranks(1, train, config)
    row = rows(tmp_path)[0]
    # The embedded engine and the policy are two implementations of one model in fp32.
    assert 0 < row["mismatch/mean"] <= row["mismatch/max"] < 1e-4
    assert row["updates"] == 2 and math.isfinite(row["loss"])


@pytest.mark.parametrize("sampler", ["engine", "policy"])
def test_at_another_temperature_responses_are_on_policy_too(sampler: str, task: Path, tmp_path: Path) -> None:
    """The first update clips nothing: the ratio is that of the policy at the sampling temperature with itself."""
    sections = {"rollout": {"n": 4, "temperature": 1.4}, "objective": {"no_anchor": "force", "ratio": "ppo"}}
    run_ranks(1, train, tiny_config(task, tmp_path, steps=1, batch={"old_logprobs": sampler}, **sections))
    (row,) = rows(tmp_path)
    assert row["clip_fraction"] == 0 and row["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert row["mismatch/max"] < 1e-4


def test_a_kl_term_starts_at_zero_and_grows(task: Path, tmp_path: Path) -> None:
    run_ranks(1, train, tiny_config(task, tmp_path, objective={"kl": 0.1}))
    kl = [row["kl"] for row in rows(tmp_path)]
    assert abs(kl[0]) < 1e-6 and kl[2] > 1e-6

"""The tiny judge trained with rollouts from a real SGLang server, by the project's own loop (tests/run.sh --sglang).

One run: weights reach the server over a gloo group before every step, the server is killed in the middle of a batch,
and one sync is also done without dropping the server's cache, which shows what dropping it prevents. A short second run
is colocated: the server sleeps while the policy trains, and weights come by shared memory.
"""

import json
import os
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from real_megatron.config import RunConfig
from real_megatron.errors import EngineError
from real_megatron.judging.evaluate import evaluate
from real_megatron.judging.file import JudgeSummary, judge_file
from real_megatron.judging.judge import Judge
from real_megatron.rollout.engine import EngineSpec
from real_megatron.rollout.sglang.engine import SGLangEngine
from tests.support.served_runs import PROMPTS, SAME, SAMPLES, served_config, uneven_task, watched
from tests.support.tiny_runs import rows

pytestmark = pytest.mark.sglang

STEPS = 4
KILLED_STEP, UNFLUSHED_STEP = 1, 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def run(task: Path, sglang_python: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict]:
    """The run's configuration, and what was seen of it."""
    directory = tmp_path_factory.mktemp("run")
    config = served_config(
        "sglang",
        task,
        directory / "run",
        steps=STEPS,
        rollout={"python": sglang_python, "weight_sync": "distributed"},
        data={"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}},
        evaluation={"temperature": 0.0, "bootstrap": 10, "every": 2},
        checkpoint={"save_hf": True},
    )
    return config, watched(config, directory, KILLED_STEP, UNFLUSHED_STEP)


def test_served_log_probs_are_the_policys_after_every_sync(run: tuple[RunConfig, dict]) -> None:
    syncs = run[1]["syncs"]
    assert {sync["step"] for sync in syncs} == set(range(STEPS + 1))
    assert all(sync["worst"] < SAME for sync in syncs), syncs


def test_every_sampled_token_is_trained_with_the_log_prob_that_the_policy_gives_it(run: tuple[RunConfig, dict]) -> None:
    steps = run[1]["steps"]
    assert [step["versions"] for step in steps] == [[version] for version in range(STEPS)]
    assert all(step["worst"] < SAME for step in steps), steps
    trained = rows(run[0].output)[1:]
    assert all(0 < row["mismatch/mean"] <= row["mismatch/max"] < SAME for row in trained)
    assert all(abs(row["mismatch/kl_k1"]) < SAME and 0 <= row["mismatch/kl_k3"] < SAME for row in trained)


def test_a_server_killed_in_mid_batch_costs_no_response(run: tuple[RunConfig, dict]) -> None:
    """Nothing is lost or counted twice, in the step of the kill as in the others, and training goes on to its end."""
    config, seen = run
    assert seen["starts"] >= 2 and len(seen["pids"]) >= 2
    assert len(seen["steps"]) == STEPS > KILLED_STEP + 1
    for step, asked in zip(seen["steps"], seen["asked"], strict=True):
        assert step["examples"] == asked and len(set(asked)) == PROMPTS
        assert step["responses"] == [SAMPLES] * PROMPTS
    assert [row["step"] for row in rows(config.output)] == list(range(STEPS + 1))


def test_the_cache_of_old_weights_would_have_been_served(run: tuple[RunConfig, dict]) -> None:
    """Without the flush the same prompts mix old cache and new weights; so the syncs above show that it is dropped."""
    assert run[1]["unflushed"] > 20 * SAME


def test_a_colocated_server_sleeps_while_the_policy_trains(task: Path, sglang_python: str, tmp_path: Path) -> None:
    """Without a GPU nothing is released, but the server checks the order: pause, release, resume, update."""
    config = served_config(
        "sglang", task, tmp_path / "run", steps=2, rollout={"python": sglang_python, "colocate": True}
    )
    seen = watched(config, tmp_path)
    assert [sync["step"] for sync in seen["syncs"]] == [0, 1]
    assert all(seen_at["worst"] < SAME for seen_at in seen["syncs"] + seen["steps"])
    log = (config.output / "rollout/logs/sglang-0.0.log").read_text()
    requests = re.findall(r"POST /(release_memory_occupation|resume_memory_occupation|update_weights_from_tensor)", log)
    release, resume, update = "release_memory_occupation", "resume_memory_occupation", "update_weights_from_tensor"
    assert requests == [update, release, resume, update, resume, release]


def test_one_step_off_trains_on_responses_of_the_weights_before(task: Path, sglang_python: str, tmp_path: Path) -> None:
    """The server generates the next batch while the policy trains; the importance ratio sees the difference. Under
    torchrun, whose environment would tell the server of another world than its own."""
    rollout = {"python": sglang_python, "staleness": 1}
    config = served_config(
        "sglang", task, tmp_path / "run", steps=3, rollout=rollout, objective={"ratio": "truncated_is"}
    )
    seen = watched(config, tmp_path, torchrun=True)
    assert [sync["step"] for sync in seen["syncs"]] == [0, 0, 1]
    assert all(sync["worst"] < SAME for sync in seen["syncs"])
    assert [step["versions"] for step in seen["steps"]] == [[0], [0], [1]]
    assert all(step["responses"] == [SAMPLES] * PROMPTS for step in seen["steps"])
    first, *stale = rows(config.output)
    assert len(stale) == 2
    assert first["mismatch/max"] < SAME and all(row["mismatch/max"] > 20 * SAME for row in stale)


def test_no_server_is_left_behind(run: tuple[RunConfig, dict]) -> None:
    for pid in run[1]["pids"]:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)


def changed(config: RunConfig, **rollout) -> RunConfig:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})


def judged(config: RunConfig, model: Path, source: Path, output: Path) -> JudgeSummary:
    with Judge.from_pretrained(model, config=config) as judge:
        return judge_file(judge, source, output)


def test_evaluation_through_the_server_is_that_of_the_checkpoint(run: tuple[RunConfig, dict], tmp_path: Path) -> None:
    """Greedy critiques from the server in the run's last step, and from transformers on the exported weights."""
    config, _ = run
    evaluate(changed(config, engine="transformers"), config.output / "hf", tmp_path)
    exact = json.loads((tmp_path / "evaluation/dev.json").read_text())["metrics"]["rail"]["mse"]["value"]
    assert rows(config.output)[-1]["eval/dev/rail/mse"] == pytest.approx(exact, rel=1e-3)


def test_judging_through_a_server_streams_and_resumes(
    run: tuple[RunConfig, dict], task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server goes away after two batches of two rows; the same call goes on behind them; embedded, the same comes
    out."""
    config, _ = run
    model, source = config.output / "hf", task / "test_ood.jsonl"
    lengths = {name: getattr(config.data, name) for name in ("max_prompt_tokens", "max_response_tokens")}
    tokenizer = AutoTokenizer.from_pretrained(model)
    server = SGLangEngine(EngineSpec(config.rollout, model, tokenizer, tmp_path, **lengths, serve_loaded=True))
    try:
        evaluation = config.evaluation.model_copy(update={"batch_size": 2})
        monkeypatch.setenv("KEY_OF_SERVER", server.api_key)
        attached = changed(config, servers=server.urls, api_key_variable="KEY_OF_SERVER")
        served = attached.model_copy(update={"evaluation": evaluation})
        generate, calls = SGLangEngine.generate, []

        def failing(engine: SGLangEngine, *args):
            calls.append(engine)
            if len(calls) == 3:
                raise EngineError("no rollout server can serve")
            return generate(engine, *args)

        monkeypatch.setattr(SGLangEngine, "generate", failing)
        with pytest.raises(EngineError, match="no rollout server can serve"):
            judged(served, model, source, tmp_path / "served.jsonl")
        assert len((tmp_path / "served.jsonl").read_text().splitlines()) == 4
        summary = judged(served, model, source, tmp_path / "served.jsonl")
        assert (summary.judged, summary.skipped, summary.bad) == (4, 4, 0)
    finally:
        server.close()
    judged(changed(config, engine="transformers"), model, source, tmp_path / "embedded.jsonl")
    both = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("served", "embedded")
    ]
    assert len(both[0]) == 8
    for one, other in zip(*both, strict=True):
        assert (one["id"], one["critique"], one["no_anchor"]) == (other["id"], other["critique"], other["no_anchor"])
        assert one["score"] == pytest.approx(other["score"], abs=1e-3)

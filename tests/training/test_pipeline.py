"""The whole job in a few steps: SFT, REAL, evaluation, report, judging, on the tiny judge and a published file."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_megatron.bridge import convert_megatron_to_hf
from real_megatron.config import RunConfig
from real_megatron.evaluation.report import read_run, write_report
from real_megatron.evaluation.result import Evaluation
from real_megatron.judging.judge import Judge
from tests.support.documents import explained_metrics, metric_pattern
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import (
    critiques,
    evaluate,
    judge,
    rows,
    tiny_config,
    train,
    train_and_evaluate,
    write_tiny_task,
)

VICUNA = Path(__file__).parents[3] / "shared/data/vicuna_eval.json"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def pipeline(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT, then REAL from its checkpoint, each evaluated on one set."""
    runs = tmp_path_factory.mktemp("runs")
    shared = {
        "data": {"eval": {"dev": {"path": str(task / "test_ood.jsonl")}}, "max_response_tokens": 16},
        "evaluation": {"bootstrap": 20, "every": 2},
        "checkpoint": {"save_hf": True},
    }
    sft = {
        **shared,
        "objective": {"name": "raft"},
        "epochs": 1,
        "batch": {"prompts": 16},
        "data": {**shared["data"], "train": [{"path": str(task / "train_sft.jsonl")}]},
    }
    run_ranks(1, train, tiny_config(task, runs / "sft", **sft))
    real = {
        **shared,
        "steps": 2,
        "model": {"path": str(runs / "sft/hf")},
        "metrics": {"tensorboard": True, "samples_every": 1},
    }
    run_ranks(1, train_and_evaluate, tiny_config(task, runs / "real", **real), runs / "checkpoint")
    return runs


def test_every_run_leaves_its_metrics(pipeline: Path) -> None:
    sft, real = rows(pipeline / "sft"), rows(pipeline / "real")
    assert [row["step"] for row in sft] == [
        0,
        1,
        2,
        3,
        4,
    ]  # 64 examples by 16, and the evaluation before the first step
    assert sft[4]["loss"] < sft[1]["loss"]
    assert [row["step"] for row in real] == [0, 1, 2]
    for name in ("reward", "squared_error", "advantage_std", "valid", "score_entropy", "grad_norm", "lr", "tokens"):
        assert math.isfinite(real[1][name]), name
    for name in ("rollout/response_tokens", "rollout/no_anchor", "cot/distinct_2", "cot/copies"):
        assert math.isfinite(real[1][name]), name
    assert (
        "eval/dev/rail/pearson" in real[0] and "eval/dev/rail/pearson" in real[2] and "eval/dev/rail/mse" not in real[1]
    )
    # The last evaluation of SFT and the first of REAL see the same weights and seeds.
    assert sft[4]["eval/dev/rail/mse"] == pytest.approx(real[0]["eval/dev/rail/mse"], rel=1e-5)
    assert list((pipeline / "real/tensorboard").iterdir()) and (pipeline / "real/config.yaml").exists()


def test_the_document_explains_every_metric_that_a_run_writes(pipeline: Path) -> None:
    lines = [line for run in ("sft", "real") for line in (pipeline / run / "metrics.jsonl").read_text().splitlines()]
    names = {metric_pattern(name) for line in lines for name in json.loads(line)} - {"step"}
    assert len(names) > 60 and names <= explained_metrics(), sorted(names - explained_metrics())


def test_the_samples_of_a_step_are_what_the_model_says_of_them(pipeline: Path, task: Path) -> None:
    """Step 1 has SFT's weights: transformers gives the same scores, and the reward by its formula."""
    lines = (pipeline / "real/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [row["step"] for row in samples] == [1] * 8 + [2] * 8
    data = [json.loads(line) for line in (task / "train_rl.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "sft/hf")
    model = AutoModelForCausalLM.from_pretrained(pipeline / "sft/hf")
    scores = [tokenizer.convert_tokens_to_ids(text) for text in "12345"]
    for row in samples[:8]:
        example = next(example for example in data if example["id"] == row["id"])
        assert (row["prompt"], row["label"]) == (example["prompt"], example["label"])
        assert row["ending"] in ("anchor", "forced") and row["response"].endswith("[RESULT]")
        ids = tokenizer(f"{row['prompt']} {row['response']}", return_tensors="pt").input_ids
        with torch.no_grad():
            p = model(ids).logits[0, -1].double().softmax(-1)[scores]
        expected = float(p @ torch.arange(1.0, 6.0).double())
        reward = -((expected - row["label"]) ** 2) + math.log(p[int(row["label"]) - 1])
        assert row["expected_score"] == pytest.approx(expected, rel=1e-4)  # float32 on one side
        assert row["reward"] == pytest.approx(reward, rel=1e-4)
        assert row["answer"] == "12345"[int(p.argmax())]
    assert samples[0]["id"] == samples[1]["id"] != samples[2]["id"]


def test_the_phases_of_each_step_sum_to_it(pipeline: Path) -> None:
    for line in (pipeline / "real/metrics.jsonl").read_text().splitlines()[1:]:
        seconds = {k: v for k, v in json.loads(line).items() if k.startswith("seconds/")}
        step = seconds.pop("seconds/step")
        assert sum(seconds.values()) == pytest.approx(step) and {"seconds/rollout", "seconds/update"} <= seconds.keys()


def test_the_exported_checkpoint_scores_like_the_run(pipeline: Path) -> None:
    AutoModelForCausalLM.from_pretrained(pipeline / "real/hf")
    saved = json.loads((pipeline / "checkpoint/evaluation/dev.json").read_text())
    value = saved["metrics"]["rail"]["mse"]["value"]
    assert value == pytest.approx(rows(pipeline / "real")[2]["eval/dev/rail/mse"], rel=1e-5)


def test_a_converted_checkpoint_of_the_run_is_asked_like_the_run(pipeline: Path, tmp_path: Path) -> None:
    """Though the tokenizer comes from the start model, whose run was another."""
    convert_megatron_to_hf(
        pipeline / "real/checkpoints/step-000002",
        tmp_path / "hf",
        hf_path=pipeline / "sft/hf",
        workers=1,
        progress=False,
    )
    name = "real_megatron.yaml"
    run = (pipeline / "real/hf" / name).read_text()
    assert (tmp_path / "hf" / name).read_text() == run != (pipeline / "sft/hf" / name).read_text()
    prompts = ["start 3 marks good slip note good reversed good - - - - - critique:"] * 2
    answers = []
    for model in (pipeline / "real/hf", tmp_path / "hf"):
        with Judge.from_pretrained(model) as judge:
            answers.append(judge.score(prompts, critiques=2))
    assert answers[0] == answers[1]


def test_ranks_share_the_examples_of_an_evaluation(pipeline: Path, tmp_path: Path) -> None:
    config = RunConfig.from_yaml(pipeline / "real/config.yaml")
    (computed, found, predictions), (elsewhere, same, others) = run_ranks(2, evaluate, config, tmp_path)
    assert (computed, elsewhere) == (2, 0) and found == same, "rank 0 computes both decodings' metrics, for all"
    assert predictions and not others, "predictions stay with rank 0"
    one, two = (Evaluation.load(path / "evaluation/dev.json") for path in (pipeline / "checkpoint", tmp_path))
    assert [p.critiques for p in two.predictions] == [p.critiques for p in one.predictions]
    # Batches of other sizes: float32 logits differ in the last bits.
    assert [p.rail for p in two.predictions] == pytest.approx([p.rail for p in one.predictions], rel=1e-4)


def test_the_report_compares_the_runs(pipeline: Path) -> None:
    results = [read_run(name, pipeline / name) for name in ("sft", "real")]
    text = write_report(pipeline, results).read_text()
    assert "## dev" in text and "real − sft" in text
    assert (pipeline / "curves.png").stat().st_size > 1000 and (pipeline / "evaluation.png").stat().st_size > 1000


def test_judging_survives_bad_rows_and_resumes(pipeline: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompt = "start 3 marks good slip note good reversed good - - - - - critique:"
    lines = [json.dumps({"id": str(i), "prompt": prompt}) for i in range(3)]
    source.write_text(
        "\n".join([lines[0], "not json", '{"id": "x"}', json.dumps({"id": "y", "prompt": prompt * 9}), *lines[1:]])
    )
    first = run_ranks(1, judge, pipeline / "real/hf", source, output)[0]
    assert (first.judged, first.skipped, first.bad) == (3, 0, 3)
    judged = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in judged] == ["0", "1", "2"]
    assert all(set(row["distribution"]) == set("12345") and 0 <= row["score"] <= 5 for row in judged)
    errors = [json.loads(line) for line in (tmp_path / "out.jsonl.errors.jsonl").read_text().splitlines()]
    assert [e["line"] for e in errors] == [2, 3, 4] and "data.max_prompt_tokens" in errors[2]["error"]
    output.write_text("\n".join(output.read_text().splitlines()[:1]) + "\n")  # a job that was killed
    second = run_ranks(1, judge, pipeline / "real/hf", source, output)[0]
    assert (second.judged, second.skipped) == (2, 1)
    assert [json.loads(line) for line in output.read_text().splitlines()] == judged


def test_tract_trains_on_the_critiques_that_its_first_stage_writes(pipeline: Path, task: Path, tmp_path: Path) -> None:
    data = {"train": [{"path": str(task / "train_sft.jsonl"), "limit": 12}], "max_response_tokens": 16}
    tract = {"objective": {"name": "tract"}, "steps": 2}
    config, cots = tiny_config(task, tmp_path, data=data, **tract), tmp_path / "cots.jsonl"
    (count,) = run_ranks(1, critiques, config, pipeline / "sft/hf", cots, 2)
    written = [json.loads(line) for line in cots.read_text().splitlines()]
    given = [json.loads(line) for line in (task / "train_sft.jsonl").read_text().splitlines()[:12]]
    assert 0 < count == len(written) <= 24 and any(row["cot"] not in {g["cot"] for g in given} for row in written)
    prompts = {g["id"]: (g["prompt"], g["label"]) for g in given}
    for row in written:
        assert "[RESULT]" not in row["cot"]
        assert (row["messages"][0]["content"], row["label"]) == prompts[row["id"].partition("#")[0]]
    second = {"data": data | {"train": [{"path": str(cots)}]}, **tract}
    run_ranks(1, train, tiny_config(task, tmp_path / "second", **second))
    assert len(rows(tmp_path / "second")) == 2 and math.isfinite(rows(tmp_path / "second")[1]["loss"])


def test_ranks_share_the_prompts_of_critiques(pipeline: Path, task: Path, tmp_path: Path) -> None:
    data = {"train": [{"path": str(task / "train_sft.jsonl"), "limit": 5}], "max_response_tokens": 16}
    config = tiny_config(task, tmp_path, data=data)
    for world in (1, 2):
        counts = run_ranks(world, critiques, config, pipeline / "sft/hf", tmp_path / f"{world}.jsonl", 1)
        assert len(set(counts)) == 1
    assert (tmp_path / "1.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


@pytest.mark.skipif(not VICUNA.exists(), reason=f"{VICUNA} is not there")
def test_a_published_judge_file_runs_through(tmp_path: Path) -> None:
    """Prometheus' prompts and GPT-4's critiques, byte by byte, in a tiny random model: it runs, that is all."""
    from real_megatron.data.byte_model import make_byte_model

    make_byte_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32, intermediate_size=64)
    source = {"format": "vicuna_bench", "path": str(VICUNA), "limit": 3}
    common = {"steps": 2, "batch": {"prompts": 2, "max_tokens": 16384}}
    rollout = {"n": 2, "batch_size": 4}
    sft = {
        **common,
        "objective": {"name": "raft"},
        "data": {"train": [source], "max_prompt_tokens": 8192, "max_response_tokens": 4096},
        "rollout": rollout,
        "checkpoint": {"save_hf": True},
    }
    run_ranks(1, train, tiny_config(tmp_path, tmp_path / "sft", **sft))
    real = {
        **common,
        "model": {"path": str(tmp_path / "sft/hf")},
        "data": {
            "train": [source],
            "eval": {"vicuna": source},
            "max_prompt_tokens": 8192,
            "max_response_tokens": 8,
        },
        "rollout": rollout,
        "evaluation": {"bootstrap": 10, "batch_size": 4},
    }
    run_ranks(1, train, tiny_config(tmp_path, tmp_path / "real", **real))
    for run in ("sft", "real"):
        assert len(rows(tmp_path / run)) == 2 and all(math.isfinite(row["loss"]) for row in rows(tmp_path / run))
    assert Evaluation.load(tmp_path / "real/evaluation/vicuna-step-000002.json").counts["examples"] == 3

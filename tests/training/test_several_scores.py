"""Scores of several tokens and several aspects, from SFT through REAL to the judge: the tiny judge with few examples.

What the judge says is compared with whole texts through transformers: the probability of each score's tokens behind
prompt, critique and anchor, without trees, caches or batches.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_megatron.data.tiny_judge import FIVE, HUNDRED, Grades
from real_megatron.evaluation.result import Evaluation
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import judge, rows, tiny_config, train, write_tiny_task

ASPECTS = {"final": {"anchor": "final "}, "peak": {"anchor": "peak ", "weight": 3.0}}
VARIANTS: dict[str, tuple[Grades, dict[str, Any]]] = {
    "0 to 100": (HUNDRED, {"scores": "0..100"}),
    "two aspects": (replace(FIVE, aspects=True), {"aspects": ASPECTS}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A step of RAFT, two of REAL with an evaluation, and the judge on the test set: NAME, directory."""
    grades, scale = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp("run")
    task = write_tiny_task(directory / "task", grades=grades)
    shared = {
        "scale": scale,
        "checkpoint": {"save_hf": True},
        "objective": {"no_anchor": "force", "lam": 2.0},
        "evaluation": {"bootstrap": 20},
        "metrics": {"tensorboard": False, "samples_every": 1},
    }
    data = {"max_response_tokens": 24, "max_prompt_tokens": 32}
    sft = shared | {"steps": 1, "objective": {"name": "raft"}, "batch": {"prompts": 16}}
    sft["data"] = {**data, "train": [{"path": str(task / "train_sft.jsonl")}]}
    run_ranks(1, train, tiny_config(task, directory / "sft", **sft))
    real = shared | {"steps": 2, "model": {"path": str(directory / "sft/hf")}}
    real["data"] = {**data, "eval": {"dev": {"path": str(task / "test_ood.jsonl")}}}
    run_ranks(1, train, tiny_config(task, directory / "real", **real))
    run_ranks(1, judge, directory / "real/hf", task / "test_ood.jsonl", directory / "judged.jsonl")
    return request.param, directory


def test_the_judge_says_what_whole_texts_say(run: tuple[str, Path]) -> None:
    name, directory = run
    model = AutoModelForCausalLM.from_pretrained(directory / "real/hf", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(directory / "real/hf")
    prompts = [json.loads(line)["prompt"] for line in (directory / "task/test_ood.jsonl").read_text().splitlines()]

    def probability(text: str, score: str, goes_on: str) -> float:
        """π(score | text); of a score that others begin with, of nothing in `goes_on` following."""
        ids = tokenizer.encode(text)
        path = tokenizer.encode(score)
        with torch.inference_mode():
            logp = model(torch.tensor([ids + path])).logits[0].log_softmax(-1)
        total = sum(float(logp[len(ids) - 1 + t, token]) for t, token in enumerate(path))
        others = [float(logp[-1, tokenizer.encode(token)[0]].exp()) for token in goes_on]
        return math.exp(total) * (1 - sum(others))

    following = {str(k): "0123456789" for k in range(1, 10)} | {"1": "0123456789", "10": "0"}
    judged = [json.loads(line) for line in (directory / "judged.jsonl").read_text().splitlines()]
    assert len(judged) == len(prompts) == 8
    for row, prompt in zip(judged[:3], prompts, strict=False):
        text = f"{prompt} {row['critique']} [RESULT]"
        if name == "0 to 100":
            exact = {score: probability(text, score, following.get(score, "")) for score in row["distribution"]}
            # float32 against float64: what 1 − Σ loses beside what is left.
            assert row["distribution"] == pytest.approx(exact, rel=1e-4, abs=1e-8)
            assert row["score"] == pytest.approx(sum(float(k) * p for k, p in exact.items()), rel=1e-4)
            assert row["score_mass"] == pytest.approx(sum(exact.values()), rel=1e-4) and row["score_mass"] <= 1
            assert len(exact) == 101 and "aspects" not in row
        else:
            scores = []
            for aspect in ASPECTS:
                said = row["aspects"][aspect]
                exact = {score: probability(f"{text} {aspect}", score, "") for score in "12345"}
                assert said["distribution"] == pytest.approx(exact, rel=1e-4, abs=1e-8)
                assert said["score"] == pytest.approx(sum(float(k) * p for k, p in exact.items()), rel=1e-4)
                scores.append(said["score"])
            assert row["score"] == pytest.approx((scores[0] + 3 * scores[1]) / 4) and row["distribution"] is None


def test_metrics_samples_and_evaluations_are_of_each_aspect(run: tuple[str, Path]) -> None:
    name, directory = run
    steps = [row for row in rows(directory / "real") if row["step"]]
    assert len(steps) == 2 and all(math.isfinite(row["loss"]) and row["skipped_updates"] == 0 for row in steps)
    samples = [json.loads(line) for line in (directory / "real/samples.jsonl").read_text().splitlines()]
    found = {path.name.removesuffix(".json") for path in (directory / "real/evaluation").glob("*.json")}
    if name == "0 to 100":
        assert found == {"dev-step-000002"}
        assert all(0 <= float(sample["answer"]) <= 100 for sample in samples)
        return
    for row in steps:
        assert row["squared_error"] == pytest.approx((row["final/squared_error"] + row["peak/squared_error"]) / 2)
        assert row["final/label_logprob"] < 0 and row["eval/dev.peak/rail/mse"] > 0 if row["step"] == 2 else True
    assert all(set(sample["answer"]) == set(sample["label"]) == set(ASPECTS) for sample in samples)
    assert found == {f"dev{aspect}-step-000002" for aspect in ("", ".final", ".peak")}
    saved = (f"dev{aspect}-step-000002.json" for aspect in ("", ".final", ".peak"))
    whole, final, peak = (Evaluation.load(directory / "real/evaluation" / file) for file in saved)
    for overall, a, b in zip(whole.predictions, final.predictions, peak.predictions, strict=True):
        assert overall.rail is not None and a.rail is not None and b.rail is not None
        assert overall.rail == pytest.approx((a.rail + 3 * b.rail) / 4)
        assert overall.label == (a.label + 3 * b.label) / 4
        assert a.label <= b.label and overall.probabilities is None and len(b.probabilities or []) == 5

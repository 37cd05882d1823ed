"""Evaluation on a real engine: expectations against a plain forward pass, seeds, rules, and files."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from real_megatron.config import EvaluationSource
from real_megatron.errors import DataError
from real_megatron.evaluation.metrics import agreement
from real_megatron.evaluation.report import read_run, write_report
from real_megatron.evaluation.result import Evaluation, predictions_path
from real_megatron.judging.evaluate import EvaluationSet, evaluate_set, evaluate_sets
from real_megatron.rollout.engine import SamplingParams
from tests.support.judges import make_judge
from tests.support.rollout_fakes import ScriptedEngine

PARAMS = SamplingParams(n=3, max_new_tokens=12)


def evaluate(engine, tokenizer, scale, examples, params, *, name, on_progress=None, **settings):
    judge = make_judge(engine, tokenizer, scale, params, **settings)
    return evaluate_set(judge, examples, name, on_progress=on_progress)


@pytest.fixture(scope="module")
def result(engine, tokenizer, scale, examples):
    return evaluate(engine, tokenizer, scale, examples, PARAMS, name="set", seed=5, bootstrap=50)


def distribution(engine, tokenizer, scale, prompt, critique):
    """π(k | prompt, critique, anchor) from one unpadded float32 forward pass."""
    ids = prompt + tokenizer.encode(critique) + scale.anchor_ids
    with torch.inference_mode():
        logits = engine.model(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits.double().softmax(-1)[scale.score_ids].numpy()


def test_predictions_are_means_over_critiques_of_the_models_expectation(
    result, engine, tokenizer, scale, examples
) -> None:
    for prediction, example in zip(result.predictions, examples, strict=True):
        assert (prediction.id, prediction.label) == (example.id, example.label)
        assert len(prediction.critiques) == 3
        each = [distribution(engine, tokenizer, scale, example.prompt_ids, text) for text in prediction.critiques]
        mean = np.mean(each, axis=0)
        # float32 logits of a padded batch with a cache against one sequence alone.
        np.testing.assert_allclose(prediction.probabilities, mean, rtol=1e-4, atol=1e-7)
        assert prediction.rail == pytest.approx(mean @ scale.values, rel=1e-4)


def test_metrics_and_counts_are_those_of_the_predictions(result, scale) -> None:
    labels = [p.label for p in result.predictions]
    assert result.metrics["rail"] == agreement([p.rail for p in result.predictions], labels, scale.values, 50, 5)
    assert result.metrics["sampled"] == agreement([p.sampled for p in result.predictions], labels, scale.values, 50, 5)
    counts = result.counts
    assert counts["examples"] == 20 and counts["responses"] == 60 and counts["unanswered"] == 0
    assert 0 < counts["no_anchor"] < 60 and counts["forced"] == counts["no_anchor"] >= counts["truncated"]
    summary = result.summary()
    assert summary["rail/mse"] == result.metrics["rail"]["mse"].value
    assert summary["no_anchor"] == counts["no_anchor"] / 60
    mass = [sum(p.probabilities) for p in result.predictions]
    assert summary["score_mass"] == pytest.approx(np.mean(mass))


def test_nothing_but_seed_and_example_decides(result, engine, tokenizer, scale, examples) -> None:
    shuffled = [examples[i] for i in np.random.default_rng(0).permutation(20)]
    done = []
    again = evaluate(
        engine, tokenizer, scale, shuffled, PARAMS, name="set", seed=5, batch=7, bootstrap=5, on_progress=done.append
    )
    assert done == [7, 14, 20]
    own = {p.id: p for p in again.predictions}
    for prediction in result.predictions:
        assert own[prediction.id].critiques == prediction.critiques
        assert own[prediction.id].sampled == prediction.sampled
        assert own[prediction.id].rail == pytest.approx(prediction.rail, rel=1e-4)
    other = evaluate(engine, tokenizer, scale, examples, PARAMS, name="set", seed=6, bootstrap=5)
    assert [p.critiques for p in other.predictions] != [p.critiques for p in result.predictions]
    copies = [replace(examples[0], id=f"copy {i}") for i in range(100)]
    own = evaluate(engine, tokenizer, scale, copies, PARAMS, name="set", bootstrap=5).predictions
    assert len({tuple(p.critiques) for p in own}) > 1
    greedy = SamplingParams(n=1, temperature=0.0, max_new_tokens=12)
    own = evaluate(engine, tokenizer, scale, copies, greedy, name="set", bootstrap=5).predictions
    assert len({tuple(p.critiques) for p in own}) == 1 and len({p.sampled for p in own}) > 1


def test_sampled_scores_follow_the_renormalised_distribution(engine, tokenizer, scale, examples) -> None:
    """One greedy critique many times: the drawn scores' frequencies are the distribution (4 standard errors)."""
    n = 2000
    many = SamplingParams(n=n, temperature=0.0, max_new_tokens=1)
    found = evaluate(engine, tokenizer, scale, examples[:1], many, name="set", bootstrap=1).predictions[0]
    p = np.array(found.probabilities) / sum(found.probabilities)
    mean = p @ scale.values
    error = math.sqrt(p @ (np.array(scale.values) - mean) ** 2 / n)
    assert found.sampled == pytest.approx(mean, abs=4 * error) and error > 0


def test_renormalized_reads_the_score_tokens_only(result, engine, tokenizer, scale, examples) -> None:
    one = SamplingParams(n=1, max_new_tokens=12)
    full, renormalized = (
        evaluate(engine, tokenizer, scale, examples, one, name="set", probabilities=mode, bootstrap=5).predictions
        for mode in ("full", "renormalized")
    )
    for a, b in zip(full, renormalized, strict=True):
        assert a.probabilities == b.probabilities
        assert b.rail == pytest.approx(a.rail / sum(a.probabilities)) and b.rail > a.rail


def test_dropped_responses_are_counted_and_in_no_metric(engine, tokenizer, scale, examples) -> None:
    one = SamplingParams(n=1, max_new_tokens=12)
    found = evaluate(engine, tokenizer, scale, examples, one, name="set", seed=5, rule="drop", bootstrap=5)
    answered = [p for p in found.predictions if p.rail is not None]
    assert 0 < found.counts["unanswered"] == 20 - len(answered) == found.counts["no_anchor"]
    assert found.counts["forced"] == 0
    labels = [p.label for p in answered]
    assert found.metrics["rail"] == agreement([p.rail for p in answered], labels, scale.values, 5, 5)


def test_a_judge_that_never_answers_has_no_numbers_and_says_why(engine, tokenizer, scale, examples, tmp_path) -> None:
    """As before a warm-up: training that evaluates itself must not end with it."""
    silent = SamplingParams(n=1, max_new_tokens=1)
    found = evaluate(engine, tokenizer, scale, examples[:2], silent, name="set", seed=1, rule="drop")
    assert found.counts["unanswered"] == 2 and [p.rail for p in found.predictions] == [None, None]
    for estimate in (e for row in found.metrics.values() for e in row.values()):
        assert math.isnan(estimate.value) and estimate.note == "no response has the anchor '[RESULT]'"
    assert math.isnan(found.summary()["score_mass"]) and found.summary()["no_anchor"] == 1.0
    found.save(tmp_path / "evaluation/set.json")
    text = write_report(tmp_path, [read_run("silent", tmp_path)]).read_text()
    assert "| silent | RAIL | 0 | undefined |" in text and "no response has the anchor" in text


def test_a_saved_evaluation_comes_back(result, tmp_path) -> None:
    path = tmp_path / "new" / "set-step-000003.json"
    result.step = 3
    result.save(path)
    assert Evaluation.load(path) == result
    assert len(predictions_path(path).read_text().splitlines()) == 20
    assert json.loads(path.read_text())["config"]["scale"]["anchor"] == "[RESULT]"
    assert {p.name for p in path.parent.iterdir()} == {path.name, predictions_path(path).name}


def test_undefined_numbers_are_null_on_disk_and_nan_in_memory(engine, tokenizer, scale, examples, tmp_path) -> None:
    same = [example for example in examples if example.label == 2.0]
    found = evaluate(engine, tokenizer, scale, same, PARAMS, name="set", bootstrap=5)
    found.save(tmp_path / "set.json")
    assert json.loads((tmp_path / "set.json").read_text())["metrics"]["rail"]["pearson"]["value"] is None
    loaded = Evaluation.load(tmp_path / "set.json").metrics["rail"]["pearson"]
    assert math.isnan(loaded.value) and loaded.note == "all labels are equal"


def test_what_is_no_evaluation_is_named(tmp_path) -> None:
    (tmp_path / "set.json").write_text('{"name": "set"}')
    with pytest.raises(DataError, match=r"set\.json: not a saved evaluation"):
        Evaluation.load(tmp_path / "set.json")


def test_an_evaluation_without_its_predictions_is_named(result, tmp_path) -> None:
    result.save(tmp_path / "set.json")
    predictions_path(tmp_path / "set.json").unlink()
    with pytest.raises(DataError, match=r"set\.json: .*set\.predictions\.jsonl is missing; evaluate again"):
        Evaluation.load(tmp_path / "set.json")


def test_examples_that_cannot_be_told_apart_are_refused(tokenizer, scale, examples) -> None:
    for broken, message in (([], "no examples"), ([examples[0], examples[0]], "'e0' occurs twice")):
        with pytest.raises(DataError, match=message):
            evaluate(ScriptedEngine(), tokenizer, scale, broken, PARAMS, name="set")


def test_a_result_says_which_column_its_labels_are(engine, tokenizer, scale, examples, tmp_path) -> None:
    judge = make_judge(engine, tokenizer, scale, SamplingParams(n=1, max_new_tokens=1), bootstrap=1)
    judge.config.data.eval = {
        "human": EvaluationSource(format="flask", path="flask.json", score="human_score"),
        "gpt4": EvaluationSource(format="flask", path="flask.json"),
    }
    sets = {name: EvaluationSet(examples[:2]) for name in ("human", "gpt4", "own")}
    results = evaluate_sets(judge, sets, tmp_path, about={"model": "m"})
    assert [results[name].config.get("label_column") for name in sets] == ["human_score", "gpt4_score", None]
    assert Evaluation.load(tmp_path / "evaluation/human.json").config["label_column"] == "human_score"
    assert all(result.config["model"] == "m" for result in results.values())


def test_the_nucleus_reaches_the_engine_and_the_result(engine, tokenizer, scale, examples) -> None:
    """A nucleus of one token is greedy."""
    narrow = SamplingParams(n=1, top_p=1e-6, max_new_tokens=12)
    greedy = SamplingParams(n=1, temperature=0.0, max_new_tokens=12)
    ours, theirs, wide = (
        evaluate(engine, tokenizer, scale, examples, params, name="set", bootstrap=1)
        for params in (narrow, greedy, SamplingParams(n=1, max_new_tokens=12))
    )
    assert [p.critiques for p in ours.predictions] == [p.critiques for p in theirs.predictions]
    assert [p.critiques for p in ours.predictions] != [p.critiques for p in wide.predictions]
    assert ours.config["top_p"] == 1e-6


def test_prompts_that_were_too_long_are_counted_in_result_and_report(
    engine, tokenizer, scale, examples, tmp_path
) -> None:
    judge = make_judge(engine, tokenizer, scale, PARAMS, bootstrap=5)
    sets = {"dev": EvaluationSet(examples, dropped=3, cut=2), "other": EvaluationSet(examples)}
    evaluate_sets(judge, sets, tmp_path)
    run = read_run("run", tmp_path)
    counts = {e.name: (e.counts["prompts_dropped"], e.counts["prompts_cut"]) for e in run.evaluations}
    assert counts == {"dev": (3, 2), "other": (0, 0)}
    text = write_report(tmp_path / "report", [run]).read_text()
    assert text.count("Prompts beyond the length limit") == 1
    assert "- run: 3 dropped, 2 cut at their beginning." in text.split("## other")[0]

"""Several scores of a response in judging and evaluation: what each aspect gets, and what missing labels change."""

import math
from dataclasses import replace

import pytest

from real_megatron.config import ScaleConfig
from real_megatron.judging.evaluate import EvaluationSet, StoredPrompts, evaluate_set, evaluate_sets
from real_megatron.judging.kept import KeptReadings
from real_megatron.rollout.engine import SamplingParams
from real_megatron.scores import ScoreScale
from tests.support.judges import make_judge

ASPECTS = {"x": {"anchor": "a ", "scores": ["1", "2", "3"]}, "y": {"anchor": "b ", "scores": ["1", "3"], "weight": 3}}


@pytest.fixture(scope="module")
def judge(engine, tokenizer):
    scale = ScoreScale.of(tokenizer, ScaleConfig.model_validate({"aspects": ASPECTS}))
    return make_judge(engine, tokenizer, scale, SamplingParams(n=2, max_new_tokens=12), bootstrap=20)


def labelled(examples, count: int):
    """Both labels for most, one for some."""
    rows = [(1.0 + i % 3, 1.0 + i % 2) for i in range(count)]
    rows[1], rows[2] = (None, 3.0), (2.0, None)
    return [replace(example, labels=labels) for example, labels in zip(examples, rows, strict=True)]


def test_a_score_has_its_aspects_and_is_their_mean_by_weight(judge, engine, tokenizer) -> None:
    (score,) = judge.score(["1 a b"], critiques=2)
    x, y = score.aspects["x"], score.aspects["y"]
    assert score.score == pytest.approx((x.score + 3 * y.score) / 4) and score.distribution is None
    assert score.score_mass == pytest.approx((x.score_mass + y.score_mass) / 2)
    assert list(x.distribution) == ["1", "2", "3"] and list(y.distribution) == ["1", "3"]
    for sample in score.samples:
        assert x.score_mass == pytest.approx(sum(s.aspects["x"].score_mass for s in score.samples) / 2)
        assert sample.aspects["y"].sampled_score in (1.0, 3.0)
    # The first aspect is what a judge of it alone says, whose anchor is both anchors.
    alone = ScoreScale.resolve(tokenizer, ["1", "2", "3"], None, "[RESULT] a ")
    sequence = tokenizer.encode(f"1 a b {score.samples[0].critique} [RESULT] a")
    logprobs = engine.branch_logprobs([sequence], alone.tree.branches)[0].exp().tolist()
    assert list(score.samples[0].aspects["x"].distribution.values()) == pytest.approx(logprobs, rel=1e-4)


def test_results_are_over_the_examples_with_a_label(judge, examples, tmp_path) -> None:
    prompts = StoredPrompts(labelled(examples, len(examples)))
    assert [prompt.labels for prompt in prompts][:3] == [(1.0, 1.0), (None, 3.0), (2.0, None)]
    results = evaluate_sets(judge, {"dev": EvaluationSet(prompts, 1, 0)}, tmp_path)
    assert list(results) == ["dev", "dev.x", "dev.y"]
    whole, x, y = results.values()
    ids = [example.id for example in examples]
    assert [p.id for p in whole.predictions] == ids
    assert [p.id for p in x.predictions] == [id for id in ids if id != "e1"]
    assert [p.id for p in y.predictions] == [id for id in ids if id != "e2"]
    of_x, of_y = ({p.id: p for p in result.predictions} for result in (x, y))
    for prediction, example in zip(whole.predictions, prompts, strict=True):
        there = [(1, of_x.get(example.id)), (3, of_y.get(example.id))]
        there = [(weight, p) for weight, p in there if p is not None]
        mean = sum(weight * p.rail for weight, p in there) / sum(weight for weight, _ in there)
        assert prediction.rail == pytest.approx(mean) and prediction.probabilities is None
        assert of_x.get(example.id) is None or of_x[example.id].label == example.labels[0]
    assert x.counts["examples"] == y.counts["examples"] == len(ids) - 1 and x.counts["prompts_dropped"] == 1
    assert x.config["scale"]["values"] == [1, 2, 3] and y.config["scale"]["values"] == [1, 3]
    assert x.means["score_mass"] == pytest.approx(sum(sum(p.probabilities) for p in x.predictions) / len(x.predictions))
    assert 0 < y.means["score_entropy"] < math.log(2) and (tmp_path / "evaluation/dev.y.json").exists()


def test_an_aspect_without_any_label_has_no_result(judge, examples) -> None:
    only = [replace(example, labels=(2.0, None)) for example in examples[:5]]
    found = evaluate_set(judge, only, "dev")
    assert [one.name for one in found.aspects] == ["dev.x"]
    assert [p.rail for p in found.predictions] == [p.rail for p in found.aspects[0].predictions]


def test_kept_readings_have_their_aspects(judge, examples, tmp_path) -> None:
    rows = judge.read([example.prompt_ids for example in examples[:2]], ["a", "b"])
    kept = KeptReadings(tmp_path / "kept.jsonl", {})
    kept.begin()
    kept.add(rows)
    assert KeptReadings(tmp_path / "kept.jsonl", {}).begin() == rows
    assert len(rows[0][0].answer.aspects) == 2

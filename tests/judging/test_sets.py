"""Evaluation sets of a run: what cannot be evaluated is found before training, and old results do not linger."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from real_megatron.config import RunConfig
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.errors import ConfigError
from real_megatron.evaluation.metrics import agreement
from real_megatron.evaluation.report import console_table, evaluation_path, read_run, write_report
from real_megatron.judging.evaluate import evaluate, evaluate_sets, forget_evaluations, load_evaluation_sets
from real_megatron.judging.judge import Judge
from real_megatron.locks import only_writer
from real_megatron.rollout.engine import SamplingParams
from real_megatron.scores import ScoreScale
from tests.support.judges import make_judge


def test_a_set_whose_prompts_are_all_too_long_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "label": 3}) + "\n" for text in ("a long one", "short")))
    tokenizer = byte_tokenizer()
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    config = RunConfig.from_yaml(None, [f"data.eval.dev.path={path}", "data.max_prompt_tokens=5"])
    dev = load_evaluation_sets(config, tokenizer, scale)["dev"]
    (prompt,) = dev.prompts
    assert (dev.dropped, dev.cut) == (1, 0)
    assert (prompt.id, prompt.label, bytes(prompt.prompt_ids)) == ("dev-2", 3.0, b"short")
    config.data.max_prompt_tokens = 4
    with pytest.raises(ConfigError, match=r"data\.eval\.dev: no prompt of .*dev\.jsonl is short enough"):
        load_evaluation_sets(config, tokenizer, scale)
    config.data.long_prompts = "cut_left"
    dev = load_evaluation_sets(config, tokenizer, scale)["dev"]
    assert [bytes(prompt.prompt_ids) for prompt in dev.prompts] == [b" one", b"hort"]
    assert (dev.dropped, dev.cut) == (0, 2)


def test_evaluations_of_steps_that_will_be_done_again_are_removed(tmp_path: Path) -> None:
    kept = [
        evaluation_path(tmp_path, "dev"),
        evaluation_path(tmp_path, "dev", 2),
        evaluation_path(tmp_path, "a-step-b"),
    ]
    for path in [*kept, evaluation_path(tmp_path, "dev", 3), evaluation_path(tmp_path, "dev", 1_000_000)]:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        path.with_suffix(".predictions.jsonl").write_text("")
    forget_evaluations(tmp_path, 2)
    left = [*kept, *(path.with_suffix(".predictions.jsonl") for path in kept)]
    assert sorted((tmp_path / "evaluation").iterdir()) == sorted(left)
    forget_evaluations(tmp_path / "absent", 0)


def test_the_end_of_an_evaluation_says_how_many_critiques_were_cut_and_forced(
    engine, tokenizer, scale, tmp_path: Path, monkeypatch, caplog
) -> None:
    """One token is no critique: the correlations below are of answers that the judge did not give."""
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} a", "label": i}) + "\n" for i in (1, 2, 3)))
    eval_ = {"dev": {"path": str(path)}}
    judge = make_judge(engine, tokenizer, scale, SamplingParams(n=2, max_new_tokens=1), bootstrap=5, eval=eval_)
    monkeypatch.setattr(Judge, "from_pretrained", lambda *_, **__: judge)
    monkeypatch.setattr(engine, "close", lambda: None)
    with only_writer(evaluation_path(tmp_path, "dev")), pytest.raises(ConfigError, match=r"dev\.json is being written"):
        evaluate(judge.config, "model", tmp_path)
    results = evaluate(judge.config, "model", tmp_path)
    (said,) = [record for record in caplog.records if record.message.startswith("dev: ")]
    cut = results["dev"].counts["truncated"]
    assert 0 < cut <= 6  # a critique can end by itself
    assert said.levelname == "WARNING" and said.message == (
        f"dev: 6 of 6 critiques (100.0%) did not come to the anchor: {cut} were cut at 1 tokens "
        "(data.max_response_tokens), 6 got the anchor appended, and with it a score all the same; 0 of 3 examples "
        "(0.0%) have no score"
    )
    table = {str(column.header): list(column.cells) for column in console_table(results, 500).columns}
    assert table["cut"] == [f"{cut / 6:.1%}"] * 2
    assert table["forced"] == ["100.0%"] * 2 and table["no score"] == ["0.0%"] * 2
    summary = results["dev"].summary()
    assert (summary["truncated"], summary["forced"], summary["unanswered"]) == (cut / 6, 1.0, 0.0)
    assert sorted(p.name for p in (tmp_path / "evaluation").iterdir()) == ["dev.json", "dev.predictions.jsonl"]


def test_clusters_and_groups_reach_intervals_and_report(engine, tokenizer, scale, tmp_path: Path) -> None:
    """From columns of the file to `report.md`: five questions with four answers each, judged on two aspects."""
    path = tmp_path / "dev.jsonl"
    rows = [
        {"prompt": f"{1 + i % 3} {' '.join('abc'[: 1 + i % 2] * (1 + i // 6))}", "label": 1 + i % 3}
        | {"question": i // 4, "aspect": "clarity" if i % 2 else "depth"}
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = make_judge(
        *(engine, tokenizer, scale, SamplingParams(n=1, max_new_tokens=8)),
        bootstrap=50,
        eval={
            "rows": {"path": str(path)},
            "questions": {"path": str(path), "cluster": "question", "within": "aspect"},
        },
    )
    evaluate_sets(judge, load_evaluation_sets(judge.config, tokenizer, scale), tmp_path)
    run = read_run("run", tmp_path)
    rows_, questions = sorted(run.evaluations, key=lambda e: e.name, reverse=True)
    assert (questions.config["cluster"], questions.config["within"]) == ("question", "aspect")
    predictions = questions.predictions
    assert [(p.cluster, p.within) for p in predictions] == [(str(r["question"]), r["aspect"]) for r in rows]
    assert predictions == [
        replace(p, cluster=q.cluster, within=q.within) for p, q in zip(rows_.predictions, predictions, strict=True)
    ]
    numbers = [p.rail for p in predictions], [p.label for p in predictions], scale.values, 50, 0
    clusters, aspects = [p.cluster for p in predictions], [p.within for p in predictions]
    assert questions.metrics["rail"] == agreement(*numbers, clusters, aspects)
    assert rows_.metrics["rail"] == agreement(*numbers)
    text = write_report(tmp_path / "report", [run]).read_text()
    of_questions, of_rows = text.split("## rows")
    assert "95 % bootstrap intervals (BCa) over 5 clusters of examples (`question`)." in of_questions
    assert "Within `aspect`, the mean over its groups of the correlation in each:" in of_questions
    assert "95 % bootstrap intervals (BCa) over the examples." in of_rows and "Within" not in of_rows

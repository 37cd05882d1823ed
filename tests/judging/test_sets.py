"""Evaluation sets of a run: what cannot be evaluated is found before training, and old results do not linger."""

import json
from pathlib import Path

import pytest

from real_megatron.config import RunConfig
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.errors import ConfigError
from real_megatron.evaluation.report import evaluation_path
from real_megatron.judging.evaluate import forget_evaluations, load_evaluation_sets
from real_megatron.scores import ScoreScale


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

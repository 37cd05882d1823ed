import json
from pathlib import Path
from typing import Any

import pytest

from real_megatron.errors import DataError
from real_megatron.hf.directory import load_tokenizer
from real_megatron.scores import ScoreScale
from real_megatron.training.examples import target_groups
from tests.support.tiny_runs import tiny_config, write_tiny_task


def test_without_cots_the_target_is_anchor_and_score_alone(tmp_path: Path) -> None:
    """The direct judge, from the same records; critiques that they have are not used, and none is needed."""
    task = write_tiny_task(tmp_path / "task")
    tokenizer = load_tokenizer(str(task / "model"))
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    for name in ("train_sft", "train_rl"):
        data = {"train": [{"path": str(task / f"{name}.jsonl"), "limit": 5}]}
        config = tiny_config(task, tmp_path, objective={"name": "raft"}, data=data, sft={"cots": "none"})
        groups = target_groups(config, task / "model", tokenizer, scale).groups
        assert len(groups) == 5
        for group in groups:
            (target,) = group.trajectories
            assert tokenizer.decode(target.response_ids) == f"[RESULT] {group.label:g} <eos>"
            assert target.answer_index == len(scale.anchor_ids) - 1
    given = tiny_config(task, tmp_path, objective={"name": "raft"}, data=data)
    with pytest.raises(DataError, match="has no critique"):
        target_groups(given, task / "model", tokenizer, scale)


def test_critiques_that_say_the_label_are_refused(tmp_path: Path) -> None:
    """In words that are not known for a score statement, so that they cannot be cut."""
    task = write_tiny_task(tmp_path / "task")
    tokenizer = load_tokenizer(str(task / "model"))
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    file = tmp_path / "said.jsonl"
    rows = [{"prompt": "a", "label": 1 + i % 5, "cot": f"good. Note {1 + i % 5}."} for i in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def targets(objective: str = "raft", cots: str = "given", **source: Any) -> list[str]:
        sources = [{"path": str(task / "train_sft.jsonl")}, {"path": str(file), **source}]
        data = {"train": sources, "max_response_tokens": 64}
        config = tiny_config(task, tmp_path, objective={"name": objective}, data=data, sft={"cots": cots})
        return [
            tokenizer.decode(g.trajectories[0].response_ids)
            for g in target_groups(config, task / "model", tokenizer, scale).groups
        ]

    with pytest.raises(
        DataError, match=r"said.jsonl: 30 of 30 critiques say the label in their first or last sentences \(by chance: 6"
    ):
        targets()
    with pytest.raises(DataError, match="said-1: 'good. Note 1.'; .*set critique_end .*, or score_statement: keep"):
        targets("sft")
    kept, ended, direct = targets(score_statement="keep"), targets(critique_end="Note"), targets(cots="none")
    assert len(kept) == len(ended) == len(direct)
    assert len(tokenizer.encode(kept[-1])) > len(tokenizer.encode(ended[-1])) > len(tokenizer.encode(direct[-1]))

from pathlib import Path

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
        groups = target_groups(config, tokenizer, scale)
        assert len(groups) == 5
        for group in groups:
            (target,) = group.trajectories
            assert tokenizer.decode(target.response_ids) == f"[RESULT] {group.label:g} <eos>"
            assert target.answer_index == len(scale.anchor_ids) - 1
    given = tiny_config(task, tmp_path, objective={"name": "raft"}, data=data)
    with pytest.raises(DataError, match="has no critique"):
        target_groups(given, tokenizer, scale)

"""A prompt that leaves no room for a response is found before a model is loaded."""

import json
from pathlib import Path

import pytest

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import ConfigError
from real_megatron.judging.evaluate import EvaluationPrompt, EvaluationSet
from real_megatron.training.lengths import check_lengths

POSITIONS = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"model_type": "llama", "max_position_embeddings": POSITIONS, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def groups(*lengths: int) -> StoredGroups:
    return StoredGroups.of(Group([1] * n, [], label=1.0, example_id=f"row-{n}") for n in lengths)


def config(engine: str, *settings: str) -> RunConfig:
    return RunConfig.from_yaml(None, [f"rollout.engine={engine}", "data.max_response_tokens=24", *settings])


@pytest.mark.parametrize(("engine", "free"), [("transformers", 0), ("sglang", 2), ("vllm", 1)])
def test_the_longest_prompt_needs_room_for_a_response(model: Path, engine: str, free: int) -> None:
    longest = POSITIONS - 24 - free
    check_lengths(config(engine), model, groups(longest, 3), {})
    message = (
        rf"data\.train: example row-{longest + 1} has a prompt of {longest + 1} tokens.* the model has 64 positions"
    )
    with pytest.raises(ConfigError, match=message) as error:
        check_lengths(config(engine), model, groups(2, longest + 1), {})
    assert f"set data.max_prompt_tokens to {longest} or less" in str(error.value)
    assert (f"keeps {free} free" in str(error.value)) == bool(free)


def test_evaluation_prompts_need_it_too_and_supervised_ones_do_not(model: Path) -> None:
    raft = config("transformers", "objective.name=raft")
    check_lengths(raft, model, groups(60), {"dev": EvaluationSet([])})
    dev = EvaluationSet([EvaluationPrompt(example.example_id, 1.0, example.prompt_ids) for example in groups(8, 41)])
    with pytest.raises(ConfigError, match=r"data\.eval\.dev: example row-41 has a prompt of 41 tokens"):
        check_lengths(raft, model, groups(60), {"dev": dev})

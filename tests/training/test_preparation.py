"""Ranks of a host read and tokenise the data once, and have what each would have made by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.data import encode, encode_prompt, encode_target, load_examples
from real_megatron.data.encode import end_of_response
from real_megatron.hf.directory import load_tokenizer
from real_megatron.hf.stop_ids import stop_ids
from real_megatron.scores import ScoreScale
from real_megatron.training.examples import prompt_groups, target_groups
from real_megatron.training.preparation import check_settings
from real_megatron.training.resume import inputs
from tests.support.host_ranks import LOCAL_RANKS, data_of_ranks
from tests.support.ranks import run_ranks
from tests.support.tiny_runs import tiny_config, write_tiny_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_task(tmp_path_factory.mktemp("task"))


def config_of(task: Path, output: Path, reinforced: bool, **data: Any) -> RunConfig:
    """Three data sets, the last with meta of all kinds, and a test set."""
    rows = [
        {"prompt": f"great movie {i}", "label": 1 + i, "cot": "so", "group": "ä\u2028", "x": [{"y": i}]}
        for i in range(5)
    ]
    (output / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = [{"path": str(task / "train_sft.jsonl")}, {"path": str(output / "own.jsonl"), "score_statement": "keep"}]
    sections = {"train": train, "eval": {"dev": {"path": str(task / "test_ood.jsonl")}}, **data}
    return tiny_config(task, output / "run", objective={"name": "real" if reinforced else "raft"}, data=sections)


def made_directly(config: RunConfig, task: Path) -> list[Group]:
    """The groups, each example by itself."""
    tokenizer = load_tokenizer(task / "model")
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    end = end_of_response(tokenizer, stop_ids(task / "model", tokenizer), config.data)
    groups = []
    for source in config.data.train:
        for example in load_examples(source, config.data.template, scale.values):
            ids = encode_prompt(tokenizer, example, config.data)
            target = encode_target(tokenizer, scale, example, end)
            if config.is_rl:
                groups.append(Group(ids, [], example.label, example.id, example.meta))
            elif len(target.response_ids) <= config.data.max_response_tokens:
                groups.append(Group(ids, [target], example.label, example.id))
    return groups


@pytest.mark.parametrize("reinforced", [True, False])
def test_groups_are_those_of_each_example_by_itself(
    reinforced: bool, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of texts that are tokenised at a time."""
    config = config_of(task, tmp_path, reinforced, max_prompt_tokens=64, max_response_tokens=16)
    expected = made_directly(config, task)
    assert len(expected) > 50
    settings = check_settings(config, 1)
    for chunk in (7, 1000):
        monkeypatch.setattr(encode, "CHUNK", chunk)
        load = prompt_groups if reinforced else target_groups
        encoded = load(config, settings.model_dir, settings.tokenizer, settings.scale)
        assert repr([*encoded.groups]) == repr(expected)
        assert encoded.dropped == 69 - len(expected) and encoded.cut == 0


def test_one_rank_of_each_host_reads_the_data(task: Path, tmp_path: Path) -> None:
    """Two ranks of a host and one of another, as local ranks say; without them all are of one host, by its name."""
    for directory in "abc":
        (tmp_path / directory / "tmp").mkdir(parents=True)
    directories = [tmp_path / name for name in "abc"]
    config = config_of(task, tmp_path, True)
    read = [*(source.path for source in config.data.train), config.data.eval["dev"].path]
    settings = check_settings(config, 1)
    groups = prompt_groups(config, settings.model_dir, settings.tokenizer, settings.scale).groups
    digests = inputs(config, settings.model_dir, groups)
    for local_ranks, readers in ((LOCAL_RANKS, [True, False, True]), (None, [True, False, False])):
        found = run_ranks(3, data_of_ranks, config, local_ranks, directories)
        assert [reads for reads, *_ in found] == [read if reader else [] for reader in readers]
        for _, own, sets, own_digests, left in found:
            assert repr(own) == repr([*groups]) and own_digests == digests and left == []
            assert len(sets["dev"]) == 8 and sets == found[0][2]


def test_a_fault_in_the_data_of_one_host_ends_the_ranks_of_all(task: Path, tmp_path: Path) -> None:
    """By the message with file and line, on the ranks of that host alike."""
    hosts = [tmp_path / name for name in "aab"]
    config = config_of(task, tmp_path, True, train=[{"path": "train.jsonl"}])
    for host, text in zip(
        "ab", ('{"prompt": "a", "label": 9}\n', '{"prompt": "great movie", "label": 3}\n'), strict=True
    ):
        (tmp_path / host / "tmp").mkdir(parents=True)
        (tmp_path / host / "train.jsonl").write_text(text)
    first, second, other = run_ranks(3, data_of_ranks, config, LOCAL_RANKS, hosts)
    assert first == second and first.startswith("DataError: train.jsonl, line 1: label 9 is outside of the score scale")
    assert other == f"OtherRankFailed: rank 0 failed: {first}"

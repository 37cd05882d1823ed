"""A checkpoint continues its own run only; how the run is spread and saved may change."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from real_megatron.batch.types import Group
from real_megatron.config import ObjectiveConfig, OptimizerConfig, RunConfig, ScaleConfig
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import CheckpointError, ConfigError
from real_megatron.hf.identity import file_digest
from real_megatron.sections import known_keys
from real_megatron.training.resume import FREE, check_same_inputs, check_same_run, inputs, saved_inputs


def resumed(*overrides: str, base: tuple[str, ...] = ()) -> None:
    saved: dict[str, Any] = RunConfig.from_yaml(None, base).model_dump(mode="json")
    check_same_run(saved, RunConfig.from_yaml(None, [*base, *overrides]), "step-000004")


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor=2", "output=elsewhere", "checkpoint.every=3", "data.eval.dev.path=x", "model.dtype=bfloat16"]
    + ["rollout.engine=sglang", "rollout.batch_size=2", "model.path=other", "data.template=prometheus"],
)
def test_what_changes_no_update_may_change(override: str) -> None:
    resumed(override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("objective.beta=0.5", "objective.beta: 1.0 in the checkpoint, 0.5 now"),
        ("rollout.top_p=0.5", "rollout.top_p: 1.0 in the checkpoint, 0.5 now"),
        ("data.long_prompts=cut_left", "data.long_prompts: 'drop' in the checkpoint, 'cut_left' now"),
        ("data.chat_template_args.enable_thinking=false", "data.chat_template_args.enable_thinking: None in"),
        ("seed=3", "seed: 0 in the checkpoint, 3 now"),
        ("batch.prompts=8", "batch.prompts: 256 in the checkpoint, 8 now"),
        ("data.train.0.path=x", "data.train: "),
        ("model.family=qwen3", "model.family: 'auto' in the checkpoint, 'qwen3' now"),
    ],
)
def test_what_makes_it_another_run_is_refused_by_name(override: str, line: str) -> None:
    with pytest.raises(ConfigError, match="step-000004 belongs to another run") as error:
        resumed(override)
    assert line in str(error.value) and "another output directory" in str(error.value)


def test_the_form_of_the_optimizers_state_stays() -> None:
    """Megatron's load of another form ends with hundreds of missing keys, or with a KeyError."""
    plain = "parallel.distributed_optimizer=false"
    with pytest.raises(ConfigError, match="parallel.distributed_optimizer: True in the checkpoint, False now"):
        resumed(plain)
    with pytest.raises(ConfigError, match="model.dtype: 'auto' in the checkpoint, 'bfloat16' now"):
        resumed("model.dtype=bfloat16", base=(plain,))


def test_more_steps_only_where_the_schedule_does_not_decay() -> None:
    resumed("steps=500")
    for key in ("steps", "epochs"):
        with pytest.raises(ConfigError, match=f"{key}: .* in the checkpoint, 500.* now\n") as error:
            resumed(f"{key}=500", base=("optimizer.schedule=cosine",))
        assert "A run can be given more steps where optimizer.schedule is constant." in str(error.value)
    with pytest.raises(ConfigError) as error:
        resumed("seed=1")
    assert "more steps" not in str(error.value)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name, text in [("config.json", "{}"), ("tokenizer.json", "{}"), ("README.md", "x"), ("LICENSE", "x")]:
        (tmp_path / "model" / name).write_text(text)
    (tmp_path / "train.jsonl").write_text('{"prompt": "x", "label": 1}\n')
    (tmp_path / "template.txt").write_text("{prompt}")
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "model/model.safetensors")
    return tmp_path


def digests(task: Path, groups: list[Group] | None = None) -> tuple[dict[str, str], RunConfig]:
    config = RunConfig.from_yaml(
        None,
        [f"data.train.0.path={task}/train.jsonl", f"data.template={task}/template.txt", f"model.path={task}/model"],
    )
    stored = StoredGroups.of(groups or [Group([1], [], 2.0, "train-1")])
    return inputs(config, task / "model", stored), config


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("train.jsonl", "data.train.0"),
        ("template.txt", "data.template"),
        ("model/config.json", "model.path: config.json"),
        ("model/tokenizer.json", "model.path: tokenizer.json"),
        ("model/model.safetensors", "model.path: model.safetensors"),
    ],
)
def test_what_a_run_reads_is_known_by_its_content(file: str, name: str, task: Path) -> None:
    saved, config = digests(task)
    path = task / file
    data = path.read_bytes()
    os.utime(path, (1e9, 1e9))
    (task / "model/README.md").write_text("another")
    (task / "model/consolidated.safetensors").write_text("no part of the checkpoint, and not downloaded from the hub")
    check_same_inputs(saved, digests(task)[0], config, "step-000004")
    data = b" " + data
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="step-000004 was trained with other data or another model") as error:
        check_same_inputs(saved, digests(task)[0], config, "step-000004")
    (line,) = str(error.value).splitlines()[1:-1]
    assert line.startswith(f"  {name} (") and line.endswith("its content has changed")


def test_another_path_to_the_same_content_is_no_difference(task: Path, tmp_path: Path) -> None:
    saved, config = digests(task)
    link = tmp_path / "link"
    link.symlink_to(task)
    now, other = digests(link)
    check_same_inputs(saved, now, other, "step-000004")
    check_same_run(config.model_dump(mode="json"), other, "step-000004")


def test_examples_that_are_read_otherwise_and_old_checkpoints_are_refused(task: Path) -> None:
    """A format `module:name` has no file among the inputs."""
    saved, config = digests(task)
    with pytest.raises(ConfigError, match="  training examples as tokens: its content has changed"):
        check_same_inputs(saved, digests(task, [Group([1, 2], [], 2.0, "train-1")])[0], config, "step-000004")
    with pytest.raises(CheckpointError, match="step-000004 does not say which data and model"):
        saved_inputs({"config": {}}, "step-000004")
    assert saved_inputs({"inputs": saved}, "step-000004") == saved
    (task / "model/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"model.path: tokenizer.json \(.*\): is gone"):
        check_same_inputs(saved, digests(task)[0], config, "step-000004")


def test_large_weights_are_known_by_header_size_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2**20)}, path)
    before = file_digest(path, whole=1024)
    assert before == file_digest(path, whole=1024) != file_digest(path)
    save_file({"b": torch.zeros(2**20)}, path)
    assert file_digest(path, whole=1024) != before
    save_file({"a": torch.ones(2**20)}, path)
    assert file_digest(path, whole=1024) != before
    last = torch.zeros(2**20)
    last[-1] = 1
    save_file({"a": last}, path)
    assert file_digest(path, whole=1024) != before


def test_the_free_keys_exist() -> None:
    tree = RunConfig().model_dump()
    for key in FREE:
        node = tree
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_every_other_key_decides_the_run() -> None:
    """The exact list: a key that is added to the configuration must be put on one side or the other."""
    sections = {key.partition(".")[0] for key in known_keys(RunConfig) if "." in key}
    leaves = [key for key in known_keys(RunConfig) if key not in sections]
    deciding = {k for k in leaves if not any(k == free or k.startswith(free + ".") for free in FREE)}
    assert deciding == {
        *("seed", "steps", "epochs", "model.revision", "model.family", "parallel.distributed_optimizer"),
        *(f"optimizer.{key}" for key in OptimizerConfig.model_fields if key not in ("max_skipped", "spike_factor")),
        *("batch.prompts", "batch.mini_batches", "batch.old_logprobs"),
        *(f"scale.{key}" for key in ScaleConfig.model_fields),
        *(f"objective.{key}" for key in ObjectiveConfig.model_fields),
        *("rollout.n", "rollout.temperature", "rollout.top_p", "rollout.staleness"),
        "sft.cots",
        *("data.train", "data.chat_template", "data.chat_template_args"),
        *("data.max_prompt_tokens", "data.long_prompts", "data.max_response_tokens"),
    }

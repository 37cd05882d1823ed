"""A checkpoint continues its own run only; how the run is spread and saved may change."""

from typing import Any

import pytest

from real_megatron.config import ObjectiveConfig, OptimizerConfig, RunConfig, ScaleConfig
from real_megatron.errors import ConfigError
from real_megatron.sections import known_keys
from real_megatron.training.resume import FREE, check_same_run


def resumed(*overrides: str, base: tuple[str, ...] = ()) -> None:
    saved: dict[str, Any] = RunConfig.from_yaml(None, base).model_dump(mode="json")
    check_same_run(saved, RunConfig.from_yaml(None, [*base, *overrides]), "step-000004")


@pytest.mark.parametrize(
    "override",
    ["parallel.tensor=2", "output=elsewhere", "checkpoint.every=3", "data.eval.dev.path=x", "model.dtype=bfloat16"]
    + ["rollout.engine=sglang", "rollout.batch_size=2"],
)
def test_what_changes_no_update_may_change(override: str) -> None:
    resumed(override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("objective.beta=0.5", "objective.beta: 1.0 in the checkpoint, 0.5 now"),
        ("rollout.top_p=0.5", "rollout.top_p: 1.0 in the checkpoint, 0.5 now"),
        ("seed=3", "seed: 0 in the checkpoint, 3 now"),
        ("batch.prompts=8", "batch.prompts: 256 in the checkpoint, 8 now"),
        ("data.train.0.path=x", "data.train: "),
        ("model.path=other", "model.path: '' in the checkpoint, 'other' now"),
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
    with pytest.raises(ConfigError, match="steps: 100 in the checkpoint, 500 now"):
        resumed("steps=500", base=("optimizer.schedule=cosine",))


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
        *("seed", "steps", "epochs", "model.path", "model.revision", "model.family", "parallel.distributed_optimizer"),
        *(f"optimizer.{key}" for key in OptimizerConfig.model_fields),
        *("batch.prompts", "batch.mini_batches", "batch.old_logprobs"),
        *(f"scale.{key}" for key in ScaleConfig.model_fields),
        *(f"objective.{key}" for key in ObjectiveConfig.model_fields),
        *("rollout.n", "rollout.temperature", "rollout.top_p", "rollout.staleness"),
        "sft.cots",
        *("data.train", "data.template", "data.chat_template", "data.max_prompt_tokens", "data.max_response_tokens"),
    }

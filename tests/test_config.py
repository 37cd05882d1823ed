"""The run configuration: defaults are valid, contradictions between sections are refused, it survives a file."""

from pathlib import Path

import pytest

from real_megatron.config import RunConfig
from real_megatron.errors import ConfigError


def test_the_default_is_valid_and_survives_a_file(tmp_path: Path) -> None:
    config = RunConfig.from_yaml(None, ["data.eval.dev.path=x.jsonl", "scale.scores=[A, B]", "output=out"])
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config
    assert config.output == Path("out") and config.scale.scores == ["A", "B"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.sequence_parallel=true"], "parallel: sequence_parallel shards over tensor-parallel ranks"),
        (["parallel.virtual_pipeline=2"], "parallel: virtual_pipeline splits pipeline ranks"),
        (["optimizer.min_lr=1"], "optimizer: min_lr 1 is above lr 1e-06"),
        (["scale.values=[1, 2]"], "scale: values has 2 numbers for 5 scores"),
        (["scale.scores=[1, 1]"], "scale: scores must be two or more different texts"),
        (["rollout.colocate=true", "rollout.staleness=1"], "servers sleep while the policy trains"),
        (["rollout.staleness=2"], "`rollout.staleness`: Input should be 0 or 1"),
        (["objective.name=raft", "batch.mini_batches=2", "objective.ratio=ppo"], "raft has no rollouts to reuse"),
        (["objective.name=sft", "objective.kl=0.1"], "sft has no KL term"),
        (["batch.prompts=2", "batch.mini_batches=3", "objective.ratio=ppo"], "an update needs at least one prompt"),
        (["data.eval.a/b.path=x"], "'a/b' names files of results"),
        (["objective.name=[real]"], "objective.name"),
        (["seed=-1"], "`seed`: Input should be greater than or equal to 0"),
        (["epochs=.inf"], "`epochs`: Input should be a finite number"),
        (["scale.scores.0=A"], "override `scale.scores.0=A`: scale: scores must be two or more different texts"),
    ],
)
def test_contradictions_are_refused_with_the_mend(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(None, overrides)
    assert message in str(error.value)

"""The run configuration: defaults are valid, contradictions between sections are refused, it survives a file."""

import inspect
import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from real_megatron.config import RESERVED_TEMPLATE_ARGS, RunConfig
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
        (["rollout.server_args=[--port, 1]"], "server_args: --port: local servers listen where rollout.port says"),
        (["rollout.server_args=[--api_key=abc]"], "server_args: --api-key: local servers get an API key of the run's"),
        (["rollout.api_key_variable=KEY"], "api_key_variable names the API key of servers, which are empty"),
        (["rollout.port=65535", "rollout.replicas=2"], "2 ports from 65535 on go beyond 65535"),
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
def test_contradictions_are_refused_with_the_fix(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_yaml(None, overrides)
    assert message in str(error.value)


def test_fields_that_are_not_given_follow_the_objectives_name(tmp_path: Path) -> None:
    def of_name(config: RunConfig) -> tuple[str, str, bool, str]:
        objective = config.objective
        return objective.reward, objective.baseline, objective.std_normalize, objective.ratio

    real, grpo = ("real", "rloo", False, "none"), ("binary", "group_mean", True, "ppo")
    asked = RunConfig.from_yaml(None, ["objective.name=grpo"])
    assert of_name(RunConfig()) == real and of_name(asked) == grpo
    assert RunConfig().with_overrides(["objective.name=grpo"]) == asked
    assert of_name(asked.with_overrides(["seed=1"])) == grpo
    assert asked.with_overrides(["objective.name=real"]) == RunConfig()
    given = RunConfig.from_yaml(None, ["objective.reward=answer_logprob"]).with_overrides(["objective.name=grpo"])
    assert of_name(given) == ("answer_logprob", *grpo[1:])
    config = RunConfig()
    config.objective.ratio = "truncated_is"
    config.objective.name = "grpo"
    assert of_name(config) == (*grpo[:3], "truncated_is")
    # A saved configuration gives every field.
    (tmp_path / "config.yaml").write_text(RunConfig().to_yaml())
    assert of_name(RunConfig.from_yaml(tmp_path / "config.yaml", ["objective.name=grpo"])) == real
    saved = RunConfig.from_yaml(tmp_path / "config.yaml")
    assert saved == RunConfig() and of_name(saved.with_overrides(["objective.name=grpo"])) == real


def test_overrides_keep_what_was_changed_in_place() -> None:
    config = RunConfig.from_yaml(None, ["data.eval.dev.path=x.jsonl"])
    config.evaluation.samples = 3
    config.rollout.servers.append("http://127.0.0.1:1")
    config.optimizer = config.optimizer.model_copy(update={"lr": 0.5})
    changed = config.with_overrides(["seed=4"])
    assert changed == config.model_copy(update={"seed": 4}) and changed.evaluation.samples == 3


def test_no_key_of_another_section_is_suggested_for_a_likeness() -> None:
    with pytest.raises(ConfigError, match="unknown key `rollout.max_new_tokens`; known keys here: engine, n, "):
        RunConfig.from_yaml(None, ["rollout.max_new_tokens=4"])
    with pytest.raises(ConfigError, match="unknown key `rollout.max_tokens`; did you mean `batch.max_tokens`"):
        RunConfig.from_yaml(None, ["rollout.max_tokens=4"])
    with pytest.raises(ConfigError, match="`rollout.max_response_token`; did you mean `data.max_response_tokens`"):
        RunConfig.from_yaml(None, ["rollout.max_response_token=4"])


def test_arguments_of_the_chat_template_do_not_replace_those_of_transformers() -> None:
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"self", "kwargs"}
    assert own <= RESERVED_TEMPLATE_ARGS
    for name in RESERVED_TEMPLATE_ARGS:
        with pytest.raises(ConfigError, match=f"chat_template_args: '{name}' is an argument of apply_chat_template"):
            RunConfig.from_yaml(None, [f"data.chat_template_args.{name}=false"])
    config = RunConfig.from_yaml(None, ["data.chat_template_args={enable_thinking: false}"])
    assert config.data.chat_template_args == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("end", "message"), [("(So", "'(So' is no regular expression"), ("x*", "'x*' matches the empty text")]
)
def test_an_end_of_critiques_that_cannot_be_meant_is_refused(end: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig.from_yaml(None, [f'data.train=[{{path: a.jsonl, critique_end: "{end}"}}]'])

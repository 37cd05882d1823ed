"""Rotary embeddings of config.json against transformers' rotary modules; what is refused, by every command alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GlmConfig, LlamaConfig, PretrainedConfig
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from real_megatron.bridge import convert_hf_to_megatron, describe
from real_megatron.bridge.families import FAMILIES
from real_megatron.errors import ConfigError, MissingCheckpoint, UnsupportedModel
from real_megatron.hf.directory import load_tokenizer
from real_megatron.hf.rotary import longest_sequence, rotary
from real_megatron.hf.side_files import carry, read_config
from real_megatron.judging.judge import Judge
from real_megatron.policy.rope import rotary_embedding
from tests.support.policy_ranks import make_config, make_policy
from tests.support.rollout_models import word_level

SIZES: dict[str, Any] = dict(
    vocab_size=90,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=512,
)
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 8 for i in range(16)],
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500000.0,
    },
    "yarn": YARN,
    "yarn, mscale": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "beta_fast": 16.0, "truncate": False},
    "yarn, attention factor": YARN | {"attention_factor": 0.7},
    "longrope": LONGROPE,
    "longrope, attention factor": LONGROPE | {"attention_factor": 1.3},
    "dynamic": DYNAMIC,
}


def llama(rope: dict[str, Any], **more: Any) -> PretrainedConfig:
    return LlamaConfig(**SIZES | more, rope_parameters=dict(rope))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_cosines_and_sines_equal_transformers(rope: dict[str, Any]) -> None:
    """Up to the last position that is exact, which for yarn is beyond the original model's."""
    found = rotary(llama(rope))
    positions = torch.tensor([0, 1, 2, 1, 2, (found.longest or 501) - 1])
    cos, sin = LlamaRotaryEmbedding(llama(rope))(torch.zeros(1, 6, 64), positions[None])
    angles = rotary_embedding(found.frequencies, positions)
    assert angles.shape == (6, 1, 1, 32) and found.dim == 32
    # float32 angles up to 500 have an ulp of 3e-5; both sides round the same products.
    torch.testing.assert_close(angles[:, 0, 0].cos() * found.scaling, cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles[:, 0, 0].sin() * found.scaling, sin[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rope", "longest"), [(LONGROPE, 64), (DYNAMIC, 512)], ids=["longrope", "dynamic"])
def test_the_longest_sequence_is_where_transformers_changes_frequencies(rope: dict[str, Any], longest: int) -> None:
    found, module = rotary(llama(rope)), LlamaRotaryEmbedding(llama(rope))
    assert found.longest == longest == longest_sequence(llama(rope))
    for last, same in ((longest - 1, True), (longest, False)):
        module(torch.zeros(1, 1, 64), torch.tensor([[last]]))
        assert torch.equal(module.inv_freq, found.frequencies) is same


def test_other_types_are_exact_at_any_length() -> None:
    for name in ("default", "linear", "llama3", "yarn"):
        assert rotary(llama(ROPES[name])).longest is None and longest_sequence(llama(ROPES[name])) == 512
    rotary(llama(YARN)).check_length("anything", 10**6)


def test_a_partial_rotation_has_the_frequencies_of_its_dimensions() -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GlmConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=rope)
    found = rotary(config)
    assert found.dim == 16
    assert torch.equal(found.frequencies, GlmRotaryEmbedding(config).inv_freq)


def test_settings_that_differ_between_layers_are_refused() -> None:
    config = llama(ROPES["default"])
    config.rope_parameters = {"full_attention": ROPES["default"], "sliding_attention": ROPES["linear"]}
    with pytest.raises(UnsupportedModel, match="differ between layers"):
        describe(config)


def written(directory: Path, **fields: Any) -> Path:
    """A checkpoint without weights: config.json as somebody has written it, and a tokenizer."""
    word_level().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}))
    return directory


MALFORMED = {
    "unknown type": ({"type": "foo", "factor": 2.0}, "rope_type 'foo' is not supported; supported are default, linear"),
    "no type": ({"rope_type": None, "factor": 2.0}, "rope_type None is not supported"),
    "a factor that is a text": ({"rope_type": "linear", "factor": "2"}, "rope_type 'linear' gives no frequencies"),
    "a factor that turns the other way": (YARN | {"factor": -2.0}, "'yarn' gives frequencies or a scaling that are no"),
    "too few factors": (LONGROPE | {"short_factor": [1.0]}, "short_factor has 1 numbers, and a head 16 pairs"),
    "theta": ({"rope_type": "default", "rope_theta": "1e4"}, "rope_theta = '1e4' is no positive number"),
    "a missing factor": ({"rope_type": "linear"}, "Missing required keys .*'linear': {'factor'}"),
    "no section": ("linear", "'rope_parameters' with value 'linear' doesn't match"),
}


@pytest.mark.parametrize(("rope", "message"), MALFORMED.values(), ids=MALFORMED)
def test_settings_without_meaning_are_one_error_in_every_command(rope: Any, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model", rope_scaling=rope)
    messages = set()
    for command in (
        lambda: convert_hf_to_megatron(path, tmp_path / "megatron", progress=False),
        lambda: (load_tokenizer(path), make_policy(make_config(path))),
        lambda: Judge.from_pretrained(path, overrides=["scale.scores=[1, 2, 3]", "scale.anchor='[RESULT] '"]),
    ):
        with pytest.raises((UnsupportedModel, MissingCheckpoint), match=message) as refused:
            command()
        messages.add(str(refused.value))
    assert len(messages) == 1 and messages.pop().startswith(str(path / "config.json"))


def test_what_only_transformers_runs_is_refused_for_the_policy_alone(tmp_path: Path) -> None:
    path = written(tmp_path, rope_scaling={"rope_type": "proportional", "factor": 1.0})
    config = read_config(path)
    with pytest.raises(UnsupportedModel, match="'proportional' is not supported; supported are default"):
        describe(config)


@pytest.mark.parametrize(("rope", "longest"), [(LONGROPE, 64), (DYNAMIC, 512)], ids=["longrope", "dynamic"])
def test_training_on_longer_rows_is_refused(rope: dict[str, Any], longest: int, tmp_path: Path) -> None:
    path = written(tmp_path / "model", rope_parameters=rope)
    data = {"max_prompt_tokens": longest - 19, "max_response_tokens": 20}
    with pytest.raises(
        ConfigError,
        match=rf"data\.max_prompt_tokens \+ data\.max_response_tokens = {longest + 1}: .*'{rope['rope_type']}'.*"
        rf"beyond {longest} tokens \(.*max_position_embeddings in config\.json\).*lower it to {longest}",
    ):
        make_policy(make_config(path, data=data))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_copy_keeps_the_settings_as_they_are_written(key: str, tmp_path: Path) -> None:
    """In the words of transformers 4 or 5; the exported checkpoint and the converted one are written by `carry`."""
    path = written(tmp_path / "source", **{key: YARN})
    carry(path, tmp_path / "target", torch.bfloat16)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target"))
    assert after == before | {"torch_dtype": "bfloat16"}
    both = [AutoConfig.from_pretrained(tmp_path / name).rope_parameters for name in ("source", "target")]
    assert both[0] == both[1] == YARN


@pytest.mark.parametrize("name", ROPES)
def test_every_family_runs_every_type_and_mixtral_some_with_head_dim_only(name: str, tmp_path: Path) -> None:
    """As docs/extending.md says."""
    for family in FAMILIES:
        path = written(tmp_path / family, model_type=family, rope_parameters=ROPES[name], head_dim=32)
        assert rotary(read_config(path)).type == ROPES[name]["rope_type"]
    path = written(tmp_path / "without", model_type="mixtral", rope_parameters=ROPES[name])
    if ROPES[name]["rope_type"] not in ("yarn", "longrope", "dynamic"):
        assert rotary(read_config(path)).dim == 32
        return
    with pytest.raises((UnsupportedModel, MissingCheckpoint), match="write head_dim, hidden_size / num_attention_h"):
        read_config(path)


def test_two_sections_are_refused(tmp_path: Path) -> None:
    """transformers would read the second section alone, with the default rope_theta."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"rope_scaling": yarn}))
    with pytest.raises(UnsupportedModel, match="both rope_parameters and rope_scaling.* remove rope_scaling"):
        read_config(tmp_path)
    file.write_text(json.dumps(raw | {"rope_parameters": yarn | {"rope_theta": 1e6}}))
    assert rotary(read_config(tmp_path)).frequencies[-1] < 1e-5

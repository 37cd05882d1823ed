"""Rotary position embeddings as a checkpoint's config.json asks for them, computed by transformers' own formulas."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from real_megatron.errors import ConfigError, UnsupportedModel

SUPPORTED = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
# Types of single architectures, which transformers computes in the model itself.
_OF_MODELS = ("axial",)
HEAD_DIM_HINT = "write head_dim, hidden_size / num_attention_heads, into config.json"
"""For classes whose head_dim is None by default (Mixtral's), with which transformers' formulas compute all the same."""
_SECTION = "rope_parameters (in files of transformers 4: rope_scaling)"


@dataclass(frozen=True)
class Rotary:
    """What rotates queries and keys: position p turns pair i of the rotated dimensions by p · frequencies[i]."""

    type: str
    """`rope_type` of config.json."""
    frequencies: Tensor
    """Inverse frequencies, float32 `[rotated dimensions / 2]`."""
    scaling: float = 1.0
    """Cosine and sine are multiplied by it (yarn, longrope), so products of rotated dimensions by its square."""
    longest: int | None = None
    """Tokens of the longest sequence that these frequencies are those of; None: of any length."""

    @property
    def dim(self) -> int:
        """How many dimensions of a head are rotated, the first ones."""
        return 2 * self.frequencies.numel()

    def check_length(self, what: str, tokens: int) -> None:
        """Raise ConfigError, naming `what` is too long, for sequences of so many tokens.

        transformers then has other frequencies for all sequences of a batch, so that the log-probs of one depend on
        the others.
        """
        if self.longest is not None and tokens > self.longest:
            raise ConfigError(
                f"{what} = {tokens}: with rope_type '{self.type}' the model's frequencies depend on the longest "
                f"sequence of a batch beyond {self.longest} tokens ({_LIMITS[self.type]} in config.json), which is not "
                f"supported: lower it to {self.longest}"
            )


_LIMITS = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}


def rotary(hf_config: PretrainedConfig) -> Rotary:
    """The rotary embedding of a checkpoint.

    Raises UnsupportedModel, naming config.json and the key, for a type that is not supported and for parameters that
    give no frequencies.
    """
    check_rotary(hf_config)
    rope = _parameters(hf_config)
    kind = rope.get("rope_type", "default")
    if _differs_between_layers(rope):
        raise _refusal(hf_config, "settings that differ between layers are not supported")
    if kind not in SUPPORTED:
        raise _unknown(hf_config, kind)
    found = _compute(hf_config, kind)
    rotated = _rotated(hf_config)
    if found.dim != rotated:
        raise _refusal(hf_config, f"{found.dim // 2} frequencies for {rotated} rotated dimensions of a head")
    return found


def check_rotary(hf_config: PretrainedConfig) -> None:
    """Raise UnsupportedModel, as `rotary` does, for settings that transformers itself cannot run."""
    rope = _parameters(hf_config)
    kind = rope.get("rope_type", "default")
    if _differs_between_layers(rope):
        return
    theta = rope.get("rope_theta")
    if theta is not None and not (isinstance(theta, int | float) and theta > 0):
        raise _refusal(hf_config, f"rope_theta = {theta!r} is no positive number")
    if kind in ROPE_INIT_FUNCTIONS:
        _compute(hf_config, kind)
    elif kind not in ("default", *_OF_MODELS):
        raise _unknown(hf_config, kind)


def longest_sequence(hf_config: PretrainedConfig) -> int | None:
    """Tokens of the longest sequence that a model takes: `max_position_embeddings`, or `Rotary.longest` where that is
    less. None: the configuration does not say."""
    limits = (getattr(hf_config, "max_position_embeddings", None), _longest(hf_config))
    return min((limit for limit in limits if limit), default=None)


def _longest(hf_config: PretrainedConfig) -> int | None:
    rope = _parameters(hf_config)
    kind = rope.get("rope_type")
    if kind == "longrope":  # beyond, transformers takes long_factor for all positions
        return int(rope["original_max_position_embeddings"])
    if kind == "dynamic":  # beyond, the base grows with the longest sequence
        return int(hf_config.max_position_embeddings)
    return None


def _parameters(hf_config: PretrainedConfig) -> dict[str, Any]:
    return getattr(hf_config, "rope_parameters", None) or {}


def _differs_between_layers(rope: dict[str, Any]) -> bool:
    """Whether there is a section for each type of layer."""
    return any(isinstance(value, dict) for value in rope.values())


def _compute(hf_config: PretrainedConfig, kind: str) -> Rotary:
    """Of sequences that are not beyond `longest`."""
    try:
        if kind == "default":  # transformers has this formula in each model
            exponents = torch.arange(0, _rotated(hf_config), 2, dtype=torch.int64).float() / _rotated(hf_config)
            frequencies, scaling = 1.0 / _parameters(hf_config)["rope_theta"] ** exponents, 1.0
        else:
            for key in ("short_factor", "long_factor") if kind == "longrope" else ():
                count, pairs = len(_parameters(hf_config)[key]), _rotated(hf_config) // 2
                if count != pairs:
                    raise ValueError(f"{key} has {count} numbers, and a head {pairs} pairs of rotated dimensions")
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
        numbers = torch.cat((frequencies, torch.tensor([scaling])))
        longest = _longest(hf_config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        if getattr(hf_config, "head_dim", 0) is None:
            reason += f"; {HEAD_DIM_HINT}"
        raise _refusal(hf_config, f"rope_type '{kind}' gives no frequencies ({reason})") from error
    if kind != "proportional" and not bool((numbers > 0).logical_and(numbers.isfinite()).all()):
        raise _refusal(hf_config, f"rope_type '{kind}' gives frequencies or a scaling that are no positive numbers")
    return Rotary(kind, frequencies, float(scaling), longest)


def _rotated(hf_config: PretrainedConfig) -> int:
    head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    return int(head * _parameters(hf_config).get("partial_rotary_factor", 1.0))


def _unknown(hf_config: PretrainedConfig, kind: object) -> UnsupportedModel:
    return _refusal(hf_config, f"rope_type {kind!r} is not supported; supported are {', '.join(SUPPORTED)}")


def _refusal(hf_config: PretrainedConfig, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"{Path(hf_config.name_or_path or '') / 'config.json'}: {_SECTION}: {why}")

"""Rotary settings of config.json that servers compute otherwise than transformers, and so than the policy.

Read in the sources of SGLang 0.5.21 and of vLLM 0.30 and 0.32, whose tables of cosines and sines equal transformers'
for every other setting of hf/rotary.py.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PretrainedConfig

from real_megatron.errors import EngineError
from real_megatron.hf.rotary import rotary


@dataclass(frozen=True)
class RotaryFaults:
    """What a kind of server does otherwise than transformers."""

    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`rope_type` → keys that transformers reads, and the server does not."""
    misread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """`rope_type` → keys by which the server scales where transformers does not, unless they are 1."""
    unscaled: frozenset[str] = frozenset()
    """`model_type` of models of which the server reads `rope_theta` alone."""

    def found(self, hf_config: PretrainedConfig) -> str:
        """The keys that make the server's rotary embedding another one, comma-separated; empty: none."""
        rope = getattr(hf_config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if hf_config.model_type in self.unscaled and kind != "default":
            return f"rope_type '{kind}'"
        keys = [key for key in self.misread.get(kind, ()) if rope.get(key) not in (None, 1)]
        ignored = [key for key in self.ignored.get(kind, ()) if rope.get(key) is not None]
        if ignored:
            as_served = copy.deepcopy(hf_config)
            for key in ignored:
                del as_served.rope_parameters[key]
            if rotary(as_served).scaling != rotary(hf_config).scaling:
                keys += ignored
        return ", ".join(keys)


_SERVERS = {
    "sglang": RotaryFaults(
        ignored={"yarn": ("attention_factor",), "longrope": ("attention_factor", "factor")},
        misread={"dynamic": ("factor", "alpha"), "yarn": ("attn_factor", "extrapolation_factor")},
        unscaled=frozenset(
            "gemma gemma2 granitemoe mixtral olmo persimmon phi stablelm starcoder2".split()  # models/*.py of SGLang
        ),
    ),
    "vllm": RotaryFaults(
        ignored={"longrope": ("attention_factor", "factor")},
        misread={"dynamic": ("alpha",)},
    ),
}


def check_served_rotary(engine: str, hf_config: PretrainedConfig) -> None:
    """Raise EngineError where servers of `rollout.engine` would have another rotary embedding than the checkpoint."""
    faults = {name: server.found(hf_config) for name, server in _SERVERS.items()}
    if not faults.get(engine):
        return
    right = ["transformers", *(name for name, keys in faults.items() if not keys)]
    raise EngineError(
        f"{Path(hf_config.name_or_path or '') / 'config.json'}: rope_parameters (in files of transformers 4: "
        f"rope_scaling): {engine} servers read {faults[engine]} otherwise than transformers and the policy do, so that "
        f"they would sample from another model: set rollout.engine to {' or '.join(right)}"
    )

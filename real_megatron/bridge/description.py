"""What a Hugging Face configuration means in Megatron-Core terms."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from real_megatron.hf.rotary import Rotary


@dataclass(frozen=True)
class ModelDescription:
    """A Hugging Face model as Megatron-Core builds it.

    transformer_config: keyword arguments of megatron.core.transformer.TransformerConfig; only what the architecture
        fixes, nothing about parallelism, precision or speed.
    sliding_window: per layer, the number of tokens that a token sees, itself included; None: all before it.
    rotary: how queries and keys are turned by position, from `hf.rotary.rotary`.
    """

    family: str
    transformer_config: dict[str, Any]
    vocab_size: int
    tied: bool
    max_positions: int
    sliding_window: tuple[int | None, ...]
    rotary: Rotary = field(repr=False, compare=False)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.transformer_config["num_layers"]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.transformer_config["hidden_size"]

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self.transformer_config["num_attention_heads"]

    @property
    def num_groups(self) -> int:
        """Number of key/value heads."""
        return self.transformer_config["num_query_groups"]

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.transformer_config["kv_channels"]

    @property
    def tensor_sizes(self) -> list[int]:
        """The tensor-parallel sizes that this model can be divided by, smallest first."""
        config, moe = self.transformer_config, self.is_moe_layer
        widths = [self.num_heads]
        if not all(map(moe, range(self.num_layers))):
            widths.append(config["ffn_hidden_size"])
        if self.num_experts:
            widths.append(config["moe_ffn_hidden_size"])
        return [
            size
            for size in range(1, self.num_heads + 1)
            if not any(width % size for width in widths) and not (self.num_groups % size and size % self.num_groups)
        ]

    @property
    def num_experts(self) -> int:
        """Experts of a mixture-of-experts layer; 0 for a dense model."""
        return self.transformer_config.get("num_moe_experts") or 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) is a mixture of experts."""
        return bool(self.num_experts) and bool(self.transformer_config["moe_layer_freq"][layer])


def divisors(count: int) -> list[int]:
    """The divisors of a positive number, smallest first."""
    return [size for size in range(1, count + 1) if count % size == 0]


def one_of(sizes: Sequence[int]) -> str:
    """Sizes to choose from, for a message."""
    return f"choose {'one of ' if len(sizes) > 1 else ''}{', '.join(map(str, sizes))}"

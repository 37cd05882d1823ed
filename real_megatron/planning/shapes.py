"""Weights of a model by where they lie, in closed form: a search asks for them thousands of times."""

from dataclasses import dataclass

from real_megatron.bridge import ModelDescription


@dataclass(frozen=True)
class Shapes:
    """Numbers of weights: of all layers together, unless stated otherwise. Norms, biases and routers are left out,
    less than 0.1 % of any model.

    attention: projections. keys: of these, the key and value projections. mlp: of dense layers. experts: of all
    experts. visited: of the experts that a token visits. vocabulary: embedding, and output layer where it is not tied.
    """

    layers: int
    moe_layers: int
    attention: int
    keys: int
    mlp: int
    experts: int
    visited: int
    vocabulary: int

    @property
    def total(self) -> int:
        """All weights."""
        return self.attention + self.mlp + self.experts + self.vocabulary

    @property
    def active(self) -> int:
        """Weights that a token is multiplied by in the layers."""
        return self.attention + self.mlp + self.visited

    def tensors(self, experts: int) -> int:
        """Hugging Face tensors of the matrices; `experts`: of a layer."""
        dense = self.layers - self.moe_layers
        return 4 * self.layers + 3 * dense + 3 * experts * self.moe_layers + 2


def shapes(description: ModelDescription) -> Shapes:
    """The weights of a model."""
    config, hidden, layers = description.transformer_config, description.hidden_size, description.num_layers
    moe_layers = sum(map(description.is_moe_layer, range(layers))) if description.num_experts else 0
    keys = 2 * hidden * description.num_groups * description.head_dim
    queries = 2 * hidden * description.num_heads * description.head_dim
    expert = 3 * hidden * config["moe_ffn_hidden_size"] if moe_layers else 0
    dense = layers - moe_layers
    return Shapes(
        layers=layers,
        moe_layers=moe_layers,
        attention=layers * (keys + queries),
        keys=layers * keys,
        mlp=dense * 3 * hidden * config["ffn_hidden_size"] if dense else 0,
        experts=moe_layers * description.num_experts * expert,
        visited=moe_layers * config["moe_router_topk"] * expert if moe_layers else 0,
        vocabulary=(1 if description.tied else 2) * description.vocab_size * hidden,
    )

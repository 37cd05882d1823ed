"""Where parameters lie in a Megatron `torch_dist` checkpoint: keys, blocks, and the file of each block.

The keys are those of `sharded_state_dict` in Megatron-Core 0.16, the same for its local and Transformer Engine specs:
  - dense models stack their layers: `decoder.layers.<name>`, with the layer as the first axis;
  - models with experts do not: `decoder.layers.<layer>.<name>`;
  - experts of a layer are stacked: `…mlp.experts.experts.<name>`, with the expert as an axis;
  - norms go by their fused name (`linear_qkv.layer_norm_weight`). Before experts the two specs disagree, so that norm
    is stored under both names.
Every linear layer also has an `_extra_state` object, which is empty without FP8 but must be there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.transforms import Piece, Shape

_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Location:
    """A parameter inside a stored tensor: key, and index and length of each stacking axis."""

    key: str
    index: Shape = ()
    counts: Shape = ()

    def shape(self, parameter: Parameter) -> Shape:
        """Shape of the stored tensor."""
        return (*self.counts, *parameter.transform.shape)

    def offset(self, piece: Piece) -> Shape:
        """Where a piece begins in the stored tensor."""
        return (*self.index, *piece.offset)


def stacks_layers(description: ModelDescription) -> bool:
    """Whether Megatron stores all layers of this model in one tensor per parameter."""
    return not description.num_experts


def locations(parameter: Parameter, description: ModelDescription, stacked: bool) -> list[Location]:
    """The places of a parameter (two where the layer specs disagree on its key); stacked: see `stacks_layers`."""
    if parameter.layer is None:
        return [Location(parameter.name)]
    prefix = f"decoder.layers.{parameter.layer}."
    index, counts = (), ()
    if stacked:
        index, counts = (parameter.layer,), (description.num_layers,)
    stored_prefix = "decoder.layers." if stacked else prefix
    if parameter.expert is not None:
        name = parameter.name.removeprefix(prefix).replace(f"local_experts.{parameter.expert}.", "experts.")
        return [
            Location(stored_prefix + name, (*index, parameter.expert), (*counts, description.num_experts)),
        ]
    names = [parameter.te_name.removeprefix(prefix)]
    if names[0] == "pre_mlp_layernorm.weight":
        names.insert(0, "mlp.linear_fc1.layer_norm_weight")
    return [Location(stored_prefix + name, index, counts) for name in names]


def extra_states(parameter: Parameter, location: Location) -> Iterator[str]:
    """Keys of the empty objects that accompany a parameter: of its linear layer, and of attention itself."""
    module = location.key.rpartition(".")[0]
    if not location.key.endswith(".weight") or not module.endswith(_LINEARS):
        return
    modules = [module]
    if module.endswith("linear_qkv"):
        modules.append(module.replace("linear_qkv", "core_attention"))
    offset = ".".join(map(str, location.index or (0,)))
    counts = ".".join(map(str, location.counts or (1,)))
    for name in modules:
        yield f"{name}._extra_state/shard_{offset}_{counts}"


@dataclass(frozen=True)
class Layout:
    """Parallel sizes that a checkpoint is written for. It can be read at any other: this decides blocks and files."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def ranks(self) -> int:
        """Writing ranks: one data-parallel replica, or as many as the experts need."""
        return self.tp * self.pp * self.ep

    def rank_of(self, parameter: Parameter, tp_rank: int, description: ModelDescription) -> int:
        """The rank that would write this shard; layers are spread evenly over pipeline stages."""
        if parameter.layer is not None:
            stage = parameter.layer * self.pp // description.num_layers
        else:
            stage = 0 if parameter.name.startswith("embedding.") else self.pp - 1
        expert_rank = 0
        if parameter.expert is not None:
            expert_rank = parameter.expert * self.ep // description.num_experts
        return (stage * self.ep + expert_rank) * self.tp + tp_rank

    def blocks(self, parameter: Parameter) -> Iterator[tuple[int, Piece]]:
        """(TP rank, piece) for everything that is stored of a parameter; replicas once."""
        shards = self.tp if parameter.transform.split_axis is not None else 1
        for rank in range(shards):
            for piece in parameter.transform.pieces(rank, shards):
                yield rank, piece

"""Where parameters are stored in a Megatron `torch_dist` checkpoint: keys, blocks, and the file of each block.

The keys are those of `sharded_state_dict` in Megatron-Core, the same for its local and Transformer Engine specs:
  - dense models stack their layers: `decoder.layers.<name>`, with the layer as the first axis;
  - models with experts do not: `decoder.layers.<layer>.<name>`;
  - experts of a layer are stacked: `…mlp.experts.experts.<name>`, with the expert as an axis;
  - norms are stored under their fused name (`linear_qkv.layer_norm_weight`). Before experts Megatron's two specs
    disagree, so that norm is stored under both names. (The policy stores it as Transformer Engine's spec does.)
Every linear layer also has an `_extra_state` object, which is empty without FP8 but must exist, and so has every norm
that Transformer Engine does not fuse into a linear layer (from its version 2 on).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from real_megatron.bridge.description import ModelDescription, divisors, one_of
from real_megatron.bridge.expansion import padded_vocab, parameters
from real_megatron.bridge.table import Parameter
from real_megatron.bridge.transforms import Block
from real_megatron.errors import ConfigError
from real_megatron.hf.checkpoint import Shape

_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_NORMS = ("q_layernorm", "k_layernorm", "pre_mlp_layernorm", "final_layernorm")


@dataclass(frozen=True)
class Location:
    """A parameter inside a stored tensor: key, and index and length of each stacking axis."""

    key: str
    index: Shape = ()
    counts: Shape = ()

    def shape(self, parameter: Parameter) -> Shape:
        """Shape of the stored tensor."""
        return (*self.counts, *parameter.transform.shape)

    def offset(self, block: Block) -> Shape:
        """Where a block of the parameter begins in the stored tensor."""
        return (*self.index, *block.offset)


def stacks_layers(description: ModelDescription) -> bool:
    """Whether Megatron stores all layers of this model in one tensor per parameter."""
    return not description.num_experts


def locations(parameter: Parameter, description: ModelDescription, stacked: bool) -> list[Location]:
    """The places of a parameter (two where the layer specs disagree on its key); stacked: see `stacks_layers`."""
    if parameter.layer is None:
        return [Location(parameter.name)]
    prefix = f"decoder.layers.{parameter.layer}."
    index: Shape = ()
    counts: Shape = ()
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
    """Keys of the empty objects that accompany a parameter: of its linear layer or norm, and of attention itself."""
    module = location.key.rpartition(".")[0]
    if not location.key.endswith(".weight") or not module.endswith(_LINEARS + _NORMS):
        return
    modules = [module]
    if module.endswith("linear_qkv"):
        modules.append(module.replace("linear_qkv", "core_attention"))
    offset = ".".join(map(str, location.index or (0,)))
    counts = ".".join(map(str, location.counts or (1,)))
    for name in modules:
        yield f"{name}._extra_state/shard_{offset}_{counts}"


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of tensor, pipeline and expert parallelism (TP, PP, EP) that a checkpoint is written for.

    It can be read at any other layout: this one decides only how it is divided into blocks and files.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Writing ranks: one data-parallel replica, or as many as the experts need."""
        return self.tensor * self.pipeline * self.expert

    def rank_of(self, parameter: Parameter, tensor_rank: int, description: ModelDescription) -> int:
        """The rank that would write this shard; layers are spread evenly over pipeline stages."""
        if parameter.layer is not None:
            stage = parameter.layer * self.pipeline // description.num_layers
        else:
            stage = 0 if parameter.name.startswith("embedding.") else self.pipeline - 1
        expert_rank = 0
        if parameter.expert is not None:
            expert_rank = parameter.expert * self.expert // description.num_experts
        return (stage * self.expert + expert_rank) * self.tensor + tensor_rank

    def blocks(self, parameter: Parameter) -> Iterator[tuple[int, Block]]:
        """(TP rank, block) for everything that is stored of a parameter; replicas once."""
        shards = self.tensor if parameter.transform.split_axis is not None else 1
        for rank in range(shards):
            for block in parameter.transform.blocks(rank, shards):
                yield rank, block


def check_layout(description: ModelDescription, layout: ParallelLayout) -> None:
    """Raise ConfigError if the parallel sizes do not divide the model."""
    tensor, pipeline, expert = layout.tensor, layout.pipeline, layout.expert
    if expert > 1 and not description.num_experts:
        raise ConfigError(f"expert={expert} is for models with experts; this one has no experts: use expert=1")
    if expert > 1 and description.num_experts % expert:
        raise ConfigError(
            f"expert={expert} does not divide the {description.num_experts} experts of this model; "
            f"{one_of(divisors(description.num_experts))}"
        )
    if description.num_layers % pipeline:
        raise ConfigError(
            f"pipeline={pipeline} does not divide the {description.num_layers} layers of this model; "
            f"{one_of(divisors(description.num_layers))}"
        )
    if description.num_groups % tensor and tensor % description.num_groups:
        raise ConfigError(
            f"tensor={tensor} is neither a divisor nor a multiple of {description.num_groups} query groups; "
            f"{one_of(description.tensor_sizes)}"
        )
    for parameter in parameters(description, vocab_rows=padded_vocab(description, tensor, 1)):
        try:
            parameter.transform.blocks(0, tensor)
        except ConfigError as error:
            raise ConfigError(
                f"tensor={tensor} does not divide '{parameter.name}': {error}; {one_of(description.tensor_sizes)}"
            ) from error

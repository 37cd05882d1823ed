"""Bytes of weights, gradients and optimizer on each rank, from the parameter table alone.

Megatron's gradient buffer decides all of them. It is filled from a chunk's last parameter to its first, each aligned to
64 elements, and cut into buckets whose ends the distributed optimizer pads, so that data-parallel ranks own equal parts
of each (megatron.core.distributed.param_and_grad_buffer). Weights lie in a buffer of the same arrangement. A test
builds the same ranks on the meta device (policy/meta.py) and finds the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod

from real_megatron.bridge import padded_vocab, parameters
from real_megatron.bridge.table import Parameter
from real_megatron.planning.workload import Layout
from real_megatron.policy.stages import layers_of_chunks

ALIGNMENT = 64
"""Elements to which the buffer aligns the start of a parameter."""
BUCKET_ALIGNMENT = 128
"""Elements, beside the data-parallel size, of which a bucket's end is a multiple."""
# The order of parameters within a layer, as Megatron's modules hold them: attention's output projection comes first.
_ORDER = (
    "input_layernorm",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "pre_mlp_layernorm",
    "mlp.router",
    "mlp.experts",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank holds before its first step."""

    weights: int
    gradients: int
    optimizer: int
    """Float32 copies of 16-bit weights, and Adam's two moments."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def state_bytes(layout: Layout, stage: int, data_rank: int = 0, expert_data_rank: int = 0) -> StateBytes:
    """What a rank of pipeline stage `stage` holds; ranks of other tensor, context and expert ranks hold as much.

    data_rank, expert_data_rank: its place among the ranks that share optimizer state, context-parallel ones among them;
    the first ones have most, since padding is at the end of each bucket.
    """
    parallel, model = layout.parallel, layout.model
    width = 4 if model.dtype == "float32" else 2
    ranks = layout.data * parallel.context
    weights = gradients = optimizer = 0
    for index, chunk in enumerate(chunk_parameters(layout, stage)):
        # As Megatron does: only the first chunk of the first stage is bucketed.
        bucket = max(40_000_000, 1_000_000 * layout.data) if index == stage == 0 else None
        for experts, size, rank in ((False, ranks, data_rank), (True, layout.expert_data, expert_data_rank)):
            mine = [parameter for parameter in chunk if parameter.expert is experts]
            buffer = Buffer.arrange(mine, bucket, size if parallel.distributed_optimizer else None)
            weights += buffer.length * width
            gradients += buffer.length * 4
            # Without 16-bit weights the weights themselves are what Adam updates.
            optimizer += buffer.owned(rank) * (8 if model.dtype == "float32" else 12)
    return StateBytes(weights, gradients, optimizer)


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as one rank holds it."""

    name: str
    elements: int
    expert: bool
    shared: bool
    """A tied embedding, of which the first and the last pipeline stage have a copy."""


@dataclass(frozen=True)
class Buffer:
    """Where parameters lie in Megatron's gradient buffer."""

    places: tuple[tuple[int, int], ...]
    """First element, and one past the last, of each parameter."""
    buckets: tuple[tuple[int, int], ...]
    """The same of each bucket, with its padding."""
    ranks: int | None
    """Data-parallel ranks that own a part of each bucket; None: each owns all of it, without alignment or padding."""

    @property
    def length(self) -> int:
        """Elements of the buffer."""
        return self.buckets[-1][1] if self.buckets else 0

    def owned(self, rank: int) -> int:
        """Elements of parameters whose optimizer state rank `rank` keeps."""
        if self.ranks is None:
            return sum(end - start for start, end in self.places)
        total = 0
        for start, end in self.buckets:
            part = (end - start) // self.ranks
            first = start + rank * part
            total += sum(max(0, min(b, first + part) - max(a, first)) for a, b in self.places)
        return total

    @classmethod
    def arrange(cls, held: Sequence[LocalParameter], bucket: int | None, ranks: int | None) -> "Buffer":
        """Arrange parameters, given in the module's order. bucket: elements after which a bucket ends; None: one."""
        places: list[tuple[int, int]] = []
        buckets: list[tuple[int, int]] = []
        at = first = 0

        def end_bucket(end: int) -> int:
            nonlocal first
            end = end if ranks is None else _up(end, lcm(ranks, BUCKET_ALIGNMENT))
            buckets.append((first, end))
            first = end
            return end

        for parameter in reversed(held):
            at = at if ranks is None else _up(at, ALIGNMENT)
            alone = parameter.shared and ranks is not None
            if alone and at > first:
                at = end_bucket(at)
            places.append((at, at + parameter.elements))
            at += parameter.elements
            if alone or (bucket is not None and at - first >= bucket):
                at = end_bucket(at)
        if at > first:
            end_bucket(at)
        return cls(tuple(places), tuple(buckets), ranks)


def chunk_parameters(layout: Layout, stage: int) -> list[list[LocalParameter]]:
    """The parameters of each model chunk of a rank of pipeline stage `stage`, in the order of Megatron's modules."""
    description, parallel = layout.description, layout.parallel
    tensor = parallel.tensor
    experts = description.num_experts // parallel.expert if description.num_experts else 0
    embedding, final, output, kinds = _table(layout)
    places = layers_of_chunks(description.num_layers, parallel)
    chunks = []
    for place in range(stage, len(places), parallel.pipeline):
        first, last = place == 0, place == len(places) - 1
        shared = description.tied and parallel.pipeline > 1
        chunk = [_local(embedding, tensor, shared)] if first else []
        for layer in places[place]:
            kind = kinds[description.is_moe_layer(layer)]
            chunk += [_local(p, tensor, layer=layer) for p in kind if p.expert is None or p.expert < experts]
        if last:
            chunk.append(_local(final, tensor))
            if output is not None:
                chunk.append(_local(output, tensor))
            elif not first:
                chunk.append(_local(embedding, tensor, shared))
        chunks.append(chunk)
    return chunks


def _table(layout: Layout) -> tuple[Parameter, Parameter, Parameter | None, dict[bool, list[Parameter]]]:
    """Embedding, final norm, output layer (None: tied), and those of a dense layer (False) and of one of experts (True)
    in the modules' order. Only one layer of each kind is listed: the largest models have tens of thousands of experts.
    """
    description = layout.description
    kinds = [description.is_moe_layer(layer) for layer in range(description.num_layers)]
    chosen = sorted({kind: layer for layer, kind in enumerate(kinds)}.values())
    settings = {**description.transformer_config, "num_layers": len(chosen)}
    if description.num_experts:
        settings["moe_layer_freq"] = [settings["moe_layer_freq"][layer] for layer in chosen]
    few = replace(description, transformer_config=settings)
    rows = padded_vocab(description, layout.parallel.tensor, layout.model.vocab_multiple)
    whole: dict[str, Parameter] = {}
    layers: dict[bool, list[Parameter]] = {}
    for parameter in parameters(few, vocab_rows=rows):
        if parameter.layer is None:
            whole[parameter.name] = parameter
        else:
            layers.setdefault(few.is_moe_layer(parameter.layer), []).append(parameter)
    for of_kind in layers.values():
        of_kind.sort(key=_place)
    return (
        whole["embedding.word_embeddings.weight"],
        whole["decoder.final_layernorm.weight"],
        whole.get("output_layer.weight"),
        layers,
    )


def _place(parameter: Parameter) -> tuple[int, int, str, bool]:
    name = parameter.name.partition(f"layers.{parameter.layer}.")[2]
    module = next(index for index, prefix in enumerate(_ORDER) if name.startswith(prefix))
    return module, parameter.expert or 0, name.rpartition(".")[0], name.endswith("bias")


def _local(parameter: Parameter, tensor: int, shared: bool = False, layer: int | None = None) -> LocalParameter:
    name = parameter.name.replace(f"layers.{parameter.layer}.", f"layers.{layer}.")
    elements = prod(parameter.transform.shard_shape(tensor))
    return LocalParameter(name, elements, parameter.expert is not None, shared)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple

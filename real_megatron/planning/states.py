"""Bytes of weights, gradients and optimizer on each rank, from the parameter table alone.

Megatron's gradient buffer decides all of them. It is filled from a chunk's last parameter to its first, each aligned to
64 elements, and cut into buckets whose ends the distributed optimizer pads, so that data-parallel ranks own equal parts
of each (megatron.core.distributed.param_and_grad_buffer). Weights lie in a buffer of the same arrangement. A test
builds the same ranks on the meta device (policy/meta.py) and finds the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from real_megatron.bridge import padded_vocab, parameters
from real_megatron.bridge.table import Parameter
from real_megatron.planning.workload import Layout
from real_megatron.policy.meta import StateBytes
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


Elements = NDArray[np.int64]


def state_bytes(
    layout: Layout, stage: int, data_rank: int = 0, expert_data_rank: int = 0, sizes: "LocalSizes | None" = None
) -> StateBytes:
    """What a rank of pipeline stage `stage` holds; ranks of other tensor, context and expert ranks hold as much.

    data_rank, expert_data_rank: its place among the ranks that share optimizer state, context-parallel ones among them;
    the first ones have most, since padding is at the end of each bucket. sizes: those of the layout's model, where they
    are known already.
    """
    parallel, model = layout.parallel, layout.model
    sizes = sizes or LocalSizes.of(layout)
    ranks = layout.data * parallel.context
    weights = gradients = optimizer = 0
    for index, (dense, experts) in enumerate(sizes.chunks(layout, stage)):
        # As Megatron does: only the first chunk of the first stage is bucketed.
        bucket = max(40_000_000, 1_000_000 * layout.data) if index == stage == 0 else None
        for mine, size, rank in ((dense, ranks, data_rank), (experts, layout.expert_data, expert_data_rank)):
            buffer = Buffer.arrange(mine, bucket, size if parallel.distributed_optimizer else None)
            weights += buffer.length * layout.itemsize
            gradients += buffer.length * 4
            # Without 16-bit weights the weights themselves are what Adam updates.
            optimizer += buffer.owned(rank) * (8 if model.dtype == "float32" else 12)
    return StateBytes(weights, gradients, optimizer)


@dataclass(frozen=True)
class Shared:
    """A tied embedding, of which the first and the last pipeline stage have a copy: it gets a bucket of its own."""

    elements: int


@dataclass(frozen=True)
class Buffer:
    """Where parameters lie in Megatron's gradient buffer. Mixtures have thousands: arrays hold them."""

    starts: Elements
    ends: Elements
    """First element, and one past the last, of each parameter."""
    buckets: tuple[tuple[int, int, int, int], ...]
    """Of each bucket: its first parameter and one past its last; first element and one past the last, with padding."""
    ranks: int | None
    """Data-parallel ranks that own a part of each bucket; None: each owns all of it, without alignment or padding."""

    @property
    def length(self) -> int:
        """Elements of the buffer."""
        return self.buckets[-1][3] if self.buckets else 0

    def owned(self, rank: int) -> int:
        """Elements of parameters whose optimizer state rank `rank` keeps."""
        total = 0
        for first, last, start, end in self.buckets:
            part = (end - start) // (self.ranks or 1)
            mine = start + (rank * part if self.ranks else 0)
            starts, ends = (x[first:last].clip(mine, mine + part) for x in (self.starts, self.ends))
            total += int((ends - starts).sum())
        return total

    @classmethod
    def arrange(cls, held: Sequence[int | Shared], bucket: int | None, ranks: int | None) -> "Buffer":
        """Arrange parameters of these sizes, given in the module's order. bucket: elements after which a bucket ends;
        None: one bucket."""
        last_first = list(reversed(held))
        sizes = np.array([one.elements if isinstance(one, Shared) else one for one in last_first], dtype=np.int64)
        aligned = sizes if ranks is None else _up(sizes, ALIGNMENT)
        # Were all one bucket.
        starts = np.concatenate(([0], aligned.cumsum()))[:-1].astype(np.int64)
        ends = starts + sizes
        # Where a bucket must end, whatever its size.
        cuts = {len(last_first)}
        if ranks is not None:
            cuts |= {cut for i, one in enumerate(last_first) if isinstance(one, Shared) for cut in (i, i + 1)}
        buckets, first, at = [], 0, 0
        while first < len(last_first):
            last = min(cut for cut in cuts if cut > first)
            if bucket is not None:
                last = min(last, first + int(np.searchsorted(ends[first:], starts[first] + bucket)) + 1)
            moved = at - starts[first]
            starts[first:last] += moved
            ends[first:last] += moved
            end = int(ends[last - 1])
            end = end if ranks is None else int(_up(end, lcm(ranks, BUCKET_ALIGNMENT)))
            buckets.append((first, last, at, end))
            first, at = last, end
        return cls(starts, ends, tuple(buckets), ranks)


@dataclass(frozen=True)
class LocalSizes:
    """Elements of a model's parameters on one tensor-parallel rank, in the order of Megatron's modules."""

    embedding: int
    final_norm: int
    output: int | None
    """None: the output layer is tied to the embedding."""
    layers: dict[bool, tuple[list[int], list[int]]]
    """Of a dense layer (False) and of one with experts (True): all parameters but experts', and those of one expert."""

    @classmethod
    def of(cls, layout: Layout) -> "LocalSizes":
        """The sizes at a layout's tensor-parallel size. Only one layer of each kind is looked at: the largest models
        have tens of thousands of experts."""
        description, tensor = layout.description, layout.parallel.tensor
        kinds = [description.is_moe_layer(layer) for layer in range(description.num_layers)]
        chosen = sorted({kind: layer for layer, kind in enumerate(kinds)}.values())
        settings = {**description.transformer_config, "num_layers": len(chosen)}
        if description.num_experts:
            settings["moe_layer_freq"] = [settings["moe_layer_freq"][layer] for layer in chosen]
        few = replace(description, transformer_config=settings)
        rows = padded_vocab(description, tensor, layout.model.vocab_multiple)
        whole: dict[str, int] = {}
        layers: dict[bool, tuple[list[int], list[int]]] = {}
        for parameter in sorted(parameters(few, vocab_rows=rows), key=_place):
            elements = prod(parameter.transform.shard_shape(tensor))
            if parameter.layer is None:
                whole[parameter.name] = elements
                continue
            others, expert = layers.setdefault(few.is_moe_layer(parameter.layer), ([], []))
            if parameter.expert is None:
                others.append(elements)
            elif parameter.expert == 0:
                expert.append(elements)
        return cls(
            whole["embedding.word_embeddings.weight"],
            whole["decoder.final_layernorm.weight"],
            whole.get("output_layer.weight"),
            layers,
        )

    def chunks(self, layout: Layout, stage: int) -> list[tuple[list[int | Shared], list[int]]]:
        """Per model chunk of a rank of pipeline stage `stage`: all parameters but experts', and those of experts."""
        description, parallel = layout.description, layout.parallel
        count = description.num_experts // parallel.expert if description.num_experts else 0
        embedding = Shared(self.embedding) if description.tied and parallel.pipeline > 1 else self.embedding
        places = layers_of_chunks(description.num_layers, parallel)
        chunks = []
        for place in range(stage, len(places), parallel.pipeline):
            first, last = place == 0, place == len(places) - 1
            dense: list[int | Shared] = [embedding] if first else []
            experts: list[int] = []
            for layer in places[place]:
                others, expert = self.layers[description.is_moe_layer(layer)]
                dense += others
                experts += expert * count
            if last:
                dense.append(self.final_norm)
                if self.output is not None:
                    dense.append(self.output)
                elif not first:
                    dense.append(embedding)
            chunks.append((dense, experts))
        return chunks


def _place(parameter: Parameter) -> tuple[int, int, str, bool]:
    """Where Megatron's modules have a parameter, within its layer."""
    name = parameter.name.partition(f"layers.{parameter.layer}.")[2]
    module = next((index for index, prefix in enumerate(_ORDER) if name.startswith(prefix)), -1)
    return module, parameter.expert or 0, name.rpartition(".")[0], name.endswith("bias")


def _up(number: Any, multiple: int) -> Any:
    """The next multiple of a number, or of each number of an array."""
    return -(-number // multiple) * multiple

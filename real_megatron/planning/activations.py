"""Bytes of activations that a training step holds on one rank at their peak, from the layout and the size of a
micro-batch alone.

They are what layers save for backward (planning/saved_tensors.py), of as many micro-batches as the pipeline's schedule
has in flight, what the last stage's head saves, what is recomputed, messages between stages, and buffers of the
backward pass. The optimizer's step comes when none of them exist.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import islice

from real_megatron.config import ParallelConfig
from real_megatron.planning.saved_tensors import (
    Kernels,
    MicrobatchSize,
    Shard,
    head_bytes,
    layer_bytes,
    recomputed_attention,
    saves_norm_input,
)
from real_megatron.planning.workload import Layout
from real_megatron.policy.stages import layers_of_chunks


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes on a rank of one pipeline stage. They add up to the peak."""

    layers: float
    """Saved by layers, of all micro-batches in flight."""
    boundary: float
    """Between pipeline stages: messages, and inputs that nothing else holds."""
    head: float
    """Saved by the final norm and the output head, on the last stage."""
    transient: float
    """What exists besides at the fullest moment of a backward pass: gradients, buffers, and what is recomputed. Less
    what the head has saved if that is free by then."""
    saved: float
    """Of all these, the most that autograd holds as saved tensors at a time."""

    @property
    def total(self) -> float:
        return self.layers + self.boundary + self.head + self.transient


def activation_bytes(
    layout: Layout,
    stage: int,
    microbatch: MicrobatchSize,
    microbatches: int,
    kernels: Kernels,
    expert_load: float = 1.0,
) -> ActivationBytes:
    """The activations of a rank of pipeline stage `stage` (0-based).

    microbatches: how many an update has on a data-parallel rank, all of this size. expert_load: rows of this rank's
    experts, relative to the mean of all ranks; 1: the router spreads tokens evenly.
    """
    shard = Shard(layout, microbatch, expert_load)
    parallel = layout.parallel
    chunks = layers_of_chunks(layout.description.num_layers, parallel)[stage :: parallel.pipeline]
    flying = in_flight(parallel, stage, microbatches)
    layers, recomputed = _layers(shard, chunks, flying, kernels)
    last = stage == parallel.pipeline - 1
    head = sum(head_bytes(shard, kernels).values()) if last else 0.0
    kinds = {layout.description.is_moe_layer(layer) for chunk in chunks for layer in chunk}
    gradients = max((_layer_gradients(shard, moe, kernels) for moe in kinds), default=0.0)
    # The head runs backward first, then layers, and at last the embedding, when one micro-batch's layers are free.
    moments = [recomputed + gradients - head]
    if last:
        moments.append(_head_buffers(shard))
    if stage == 0:
        moments.append(_vocabulary_weight(shard) - head - layers / sum(flying))
    return ActivationBytes(
        layers=layers,
        boundary=_boundary(shard, stage, flying, kernels),
        head=head,
        transient=max(0.0, *moments),
        saved=layers + max(head, recomputed),
    )


def in_flight(parallel: ParallelConfig, stage: int, microbatches: int) -> list[int]:
    """Per model chunk of a pipeline rank, the micro-batches between forward and backward pass when they are most.

    A rank warms up with some forward passes, then runs one forward and one backward pass in turn
    (`get_pp_rank_microbatches` and `get_schedule_table` of Megatron's schedules). The interleaved schedule runs
    `pipeline` micro-batches through a chunk, then through the next one.
    """
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks == 1:
        return [min(pipeline - stage, microbatches)]
    warmup = 2 * (pipeline - stage - 1) + (chunks - 1) * pipeline
    order = (
        chunk
        for first in range(0, microbatches, pipeline)
        for chunk in range(chunks)
        for _ in range(min(pipeline, microbatches - first))
    )
    started = Counter(islice(order, warmup + 1))
    return [started[chunk] for chunk in range(chunks)]


def _layers(shard: Shard, chunks: list[range], flying: list[int], kernels: Kernels) -> tuple[float, float]:
    """What the layers of a rank save; and how much more than that when most of it is recomputed."""
    description, model = shard.layout.description, shard.layout.model
    kind = {layer: description.is_moe_layer(layer) for chunk in chunks for layer in chunk}
    each = {moe: sum(layer_bytes(shard, moe, kernels).values()) for moe in set(kind.values())}
    if model.recompute != "full":
        saved = sum(
            count * sum(each[kind[layer]] for layer in chunk) for count, chunk in zip(flying, chunks, strict=True)
        )
        again = [recomputed_attention(shard, moe, kernels) for moe in each] if model.recompute == "selective" else []
        return saved, max(again, default=0.0)
    saved = recomputed = 0.0
    # A block's first norm saves the block's input, which is there already, or copies of it.
    there = shard.stream if saves_norm_input(shard, kernels) else 0
    for count, chunk in zip(flying, chunks, strict=True):
        blocks = [
            chunk[first : first + model.recompute_layers] for first in range(0, len(chunk), model.recompute_layers)
        ]
        # The input of each block, and the rotary embedding's angles, in float32.
        angles = shard.tokens * description.rotary.dim * 4 if blocks else 0
        saved += count * (len(blocks) * shard.stream + angles)
        # The last block runs backward first, and the inputs of blocks are free once those have run.
        for free, block in enumerate(reversed(blocks)):
            recomputed = max(recomputed, sum(each[kind[layer]] for layer in block) - there - free * shard.stream)
    return saved, recomputed


def _layer_gradients(shard: Shard, moe: bool, kernels: Kernels) -> float:
    """The largest gradients that exist together in a layer's backward pass, before weights' are added to float32 ones.

    Those of the MLP's hidden and of its gate and up; of its input and output, gathered; and of its first weight. Where
    one kernel runs all experts of a rank, of all their weights.
    """
    experts = shard.layout.description.num_experts // shard.layout.parallel.expert
    weights = experts if moe and kernels.transformer_engine else 1
    rows = shard.expert_rows if moe else shard.tokens
    ffn = shard.ffn(moe)
    return (rows * (3 * ffn + 2 * shard.hidden) + weights * 2 * ffn * shard.hidden) * shard.itemsize


def _head_buffers(shard: Shard) -> float:
    """Buffers of the output head's backward pass.

    Gradients of the rows and of the tokens that they are selected from, under sequence parallelism gathered and not; a
    tensor of the size of the output layer's weight (`add_weight_grad` in head/gemm.py, or its gradient); and
    the linear form's chunks within their budget: logits, also as a GEMM's 16-bit input, and a float32 sum of the rows'
    gradient.
    """
    model, parallel, itemsize = shard.layout.model, shard.layout.parallel, shard.itemsize
    buffers = (shard.rows + shard.tokens) * shard.hidden * itemsize + _vocabulary_weight(shard)
    if parallel.sequence_parallel:
        buffers += shard.stream
    if model.head == "logits":
        return buffers
    logit = 6 if itemsize == 2 and model.fp32_logits else itemsize
    row = shard.vocabulary * logit + (4 * shard.hidden if itemsize == 2 else 0)
    return buffers + min(shard.rows * row, model.head_memory_mib * 2**20)


def _vocabulary_weight(shard: Shard) -> float:
    """Bytes of the embedding, or of its gradient."""
    return shard.vocabulary * shard.hidden * shard.itemsize


def _boundary(shard: Shard, stage: int, flying: list[int], kernels: Kernels) -> float:
    """Messages between pipeline stages, and the inputs of chunks.

    An output is freed once it has been sent, an input held until its gradient has been. That costs nothing where the
    first norm saves the input, or the block that is recomputed.
    """
    parallel = shard.layout.parallel
    if parallel.pipeline == 1:
        return 0.0
    # One that comes and one that goes; the interleaved schedule has those of the next pass under way as well.
    messages = 4 if parallel.virtual_pipeline else 2
    held = 0
    if shard.layout.model.recompute != "full" and not saves_norm_input(shard, kernels):
        held = sum(flying) - (flying[0] if stage == 0 else 0)
    return (messages + held) * shard.stream

"""The micro-batches of an update, from mean lengths: what `policy/plan.py` makes of a real batch, in closed form."""

import math
from dataclasses import dataclass

from real_megatron.batch.segments import Segment, SegmentTree
from real_megatron.planning.workload import Layout, Workload
from real_megatron.policy import flops


@dataclass(frozen=True)
class Microbatches:
    """What the busiest data-parallel rank runs in one update, its context-parallel ranks together."""

    count: int
    """Micro-batches, the same on every rank."""
    tokens: float
    """Of all of them."""
    rows: float
    """Rows that reach the output head."""
    linear_flops: float
    """Forward FLOPs of the layers' weight products."""
    attention_flops: float
    """Forward FLOPs of attention."""
    head_flops: float
    """Forward FLOPs of the output head."""
    split: int
    """Pieces of a group; more than 1 where it exceeds batch.max_tokens, which needs a scoring pass."""


def microbatches(layout: Layout, workload: Workload, updates: int) -> Microbatches:
    """The busiest rank's micro-batches where the step's groups are spread over `updates` passes.

    Groups all have the mean lengths. They are packed as `batch.balance.balance` does: the fewest micro-batches that
    fit, equally many on each rank, in rounds of the pipeline size where its schedule is interleaved.
    """
    prompt, response, total = workload.prompt_tokens, workload.response_tokens, workload.responses
    if workload.share_prompt:
        fits = int((workload.max_tokens - prompt) // response)
    else:
        fits = int(workload.max_tokens // (prompt + response))
    split = math.ceil(total / min(max(1, fits), total))
    prompts = split if workload.share_prompt else total
    unit_tokens = (prompts * prompt + total * response) / split
    units = workload.prompts * split / updates
    ranks = layout.data
    step = ranks * (layout.parallel.pipeline if layout.parallel.virtual_pipeline else 1)
    per_bin = max(1, int(workload.max_tokens // unit_tokens))
    count = math.ceil(units / per_bin / step) * step // ranks
    busiest = math.ceil(units / ranks)

    own = SegmentTree((Segment(round(prompt)),))
    continued = SegmentTree((Segment(round(prompt)), Segment(round(response), 0)))
    description = layout.description
    alone = flops.attention_flops(description, own)
    pairs = prompts * alone + total * (flops.attention_flops(description, continued) - alone)
    return Microbatches(
        count=count,
        tokens=busiest * unit_tokens,
        rows=busiest * total * response / split,
        linear_flops=flops.linear_flops(description) * busiest * unit_tokens,
        attention_flops=pairs / split * busiest,
        head_flops=flops.head_flops(description) * busiest * total * response / split,
        split=split,
    )

"""Runs packed micro-batches through Megatron's pipeline schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from real_megatron.batch.packing import PackedMicrobatch
from real_megatron.head import GatherRows
from real_megatron.policy import cpu
from real_megatron.policy.attention import PackedParams

Consumer = Callable[[PackedMicrobatch, Tensor], tuple[Tensor, Any]]
"""(micro-batch, gathered log-probs `[nnz]`) → (loss contribution, anything to return)."""


def run_microbatches(
    chunks: Sequence[nn.Module],
    microbatches: Sequence[PackedMicrobatch],
    consume: Consumer,
    device: torch.device,
    forward_only: bool = False,
) -> list[Any]:
    """Forward (and backward) over all micro-batches of this data-parallel rank.

    On the last pipeline stage `consume` turns each micro-batch's log-probs into its loss contribution, of which the
    gradients are summed. Returns what `consume` gave back, in order; on other stages an empty list.
    """

    def forward_step(batches: Iterator[PackedMicrobatch], model: nn.Module):
        microbatch = next(batches)
        params = PackedParams(
            qkv_format="bshd",
            layout=microbatch.layout,
            row_positions=microbatch.row_positions.to(device),
            rows=GatherRows(microbatch.ids.to(device), microbatch.offsets.to(device)),
        )
        output = model(
            input_ids=microbatch.tokens[None].to(device),
            position_ids=microbatch.layout.positions()[None].to(device),
            attention_mask=None,
            packed_seq_params=params,
        )

        def loss(logprobs: Tensor):
            contribution, result = consume(microbatch, logprobs)
            return contribution, torch.ones((), dtype=torch.int, device=device), result

        return output, loss

    with cpu.device_mode():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            # Both are placeholders: with variable_seq_lengths the stages exchange each micro-batch's real shape.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )

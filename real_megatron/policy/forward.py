"""Runs packed micro-batches through Megatron's pipeline schedule."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from real_megatron import progress
from real_megatron.batch.context import localize
from real_megatron.batch.packing import PackedMicrobatch
from real_megatron.head import GatherRows
from real_megatron.policy import cpu
from real_megatron.policy.attention import HeadRows, PackedParams
from real_megatron.policy.context import gather_logprobs

Consumer = Callable[[PackedMicrobatch, Tensor], tuple[Tensor, Any]]
"""(micro-batch, gathered log-probs `[nnz]`) → (loss contribution, anything to return)."""
LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]
"""Megatron's: output of the last stage → (loss, number of tokens, anything to return)."""


def run_microbatches(
    chunks: Sequence[nn.Module],
    microbatches: Sequence[PackedMicrobatch],
    consume: Consumer,
    device: torch.device,
    forward_only: bool = False,
    temperature: float = 1.0,
) -> list[Any]:
    """Forward (and backward) over all micro-batches of this data-parallel rank, which its tensor-, pipeline- and
    context-parallel ranks run together. Collective: all ranks must have equally many micro-batches.

    On the last pipeline stage `consume` turns each micro-batch's log-probs into its loss contribution, of which the
    gradients are summed. Tensor- and context-parallel ranks all do so with the same log-probs, those of the whole
    micro-batch: of sampled tokens at `temperature`, of scores at 1. Returns what `consume` gave back, in order; on
    other stages an empty list.
    """

    def forward_step(batches: Iterator[PackedMicrobatch], model: nn.Module) -> tuple[Tensor, LossFunction]:
        microbatch = next(batches)
        progress.mark()
        local = localize(microbatch, parallel_state.get_context_parallel_rank())
        exchange = None if local.exchange is None else local.exchange.to(device)
        params = PackedParams(
            tree=microbatch.tree,
            head_rows=HeadRows(
                local.row_positions.to(device),
                GatherRows(local.ids.to(device), local.offsets.to(device)),
                local.token_rows,
                temperature,
            ),
            exchange=exchange,
        )
        output = model(
            input_ids=local.tokens[None].to(device),
            position_ids=local.positions[None].to(device),
            attention_mask=None,
            packed_seq_params=params,
        )

        def loss(logprobs: Tensor) -> tuple[Tensor, Tensor, Any]:
            if exchange is not None:
                # A gradient flows back to this rank's own rows only: all ranks compute the same objective.
                logprobs = gather_logprobs(logprobs, exchange.logprob_slots, exchange.logprob_width)
            contribution, result = consume(microbatch, logprobs)
            # The second value is Megatron's token count, unused: the objective has divided already.
            return contribution, torch.ones((), dtype=torch.int, device=device), result

        return output, loss

    with cpu.device_mode():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(microbatches) for _ in chunks] if len(chunks) > 1 else iter(microbatches),
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            # Both are placeholders: with variable_seq_lengths the stages exchange each micro-batch's real shape.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return results

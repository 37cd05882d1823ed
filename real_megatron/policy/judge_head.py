"""What makes a judge of one of Megatron-Core's language models: rotary positions and an output head of our own."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from real_megatron.bridge import ModelDescription
from real_megatron.config import ModelConfig
from real_megatron.head import gathered_log_softmax, linear_gathered_log_softmax
from real_megatron.policy import rope
from real_megatron.policy.attention import HeadRows


class JudgeHead(nn.Module):
    """To be mixed into a language model of Megatron-Core that calls `rotary` and `head` where they belong.

    Its forward then returns gathered log-softmax values instead of logits, and positions may restart inside a
    micro-batch.
    """

    config: TransformerConfig
    vocab_size: int
    """With padding."""
    share_embeddings_and_output_weights: bool
    shared_embedding_or_output_weight: Callable[[], Tensor]
    output_layer: nn.Module
    embedding: nn.Module
    decoder: nn.Module

    def __init__(self, *args: Any, description: ModelDescription, model: ModelConfig, **kwargs: Any) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.true_vocab_size = description.vocab_size
        self.frequencies = description.rotary.frequencies
        self.head_form = "linear" if model.head == "auto" else model.head
        self.head_memory_bytes = model.head_memory_mib * 2**20
        self.fp32_logits = model.fp32_logits

    def rotary(self, position_ids: Tensor) -> Tensor:
        """Angles of the positions `[1, T]` in the shape that Megatron's layers expect, `[T, 1, 1, rotary_dim]`."""
        self.frequencies = self.frequencies.to(position_ids.device)
        return rope.rotary_embedding(self.frequencies, position_ids[0])

    def head(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        """hidden `[T (or T / tensor), 1, H]` → log-probs of the ids that `rows` ask for, float32 `[nnz]`.

        Log-probs of sampled tokens are at `rows.temperature`, those of scores at temperature 1. Tokens and rows are
        those of this context-parallel rank. Only `rows.positions` of the hidden states reach the output layer. Each
        rank's gradient of them covers its own vocabulary shard, and is summed over tensor-parallel ranks while the
        weight's gradient is computed, or under sequence parallelism where the rows were gathered.
        """
        sequence_parallel = self.config.sequence_parallel
        hidden = hidden[:, 0]
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        hidden = hidden.index_select(0, rows.positions)
        scale = None
        if rows.temperature != 1:
            scale = hidden.new_ones(hidden.shape[0], dtype=torch.float32)
            scale[: rows.tokens] = 1 / rows.temperature
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        if self.head_form == "linear":
            return linear_gathered_log_softmax(
                hidden,
                weight,
                rows.ids,
                vocab_size=self.true_vocab_size,
                padded_vocab_size=self.vocab_size,
                group=group,
                memory_budget_bytes=self.head_memory_bytes,
                fp32_logits=self.fp32_logits,
                row_scale=scale,
                reduce_dhidden="none" if sequence_parallel else "all_reduce",
            )
        if scale is not None:  # (hidden / T) @ weightᵀ, rather than one more tensor of logits
            hidden = (hidden * scale.unsqueeze(1)).to(hidden.dtype)
        # What Megatron's ColumnParallelLinear runs; it would itself gather all tokens, not only these rows.
        logits = linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            bias=None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=not sequence_parallel and group.size() > 1,
            sequence_parallel=False,
            tp_group=group,
        )
        logprobs = gathered_log_softmax(
            logits,
            rows.ids,
            vocab_size=self.true_vocab_size,
            padded_vocab_size=self.vocab_size,
            group=group,
            inplace_backward=True,
        )
        assert isinstance(logprobs, Tensor)  # one result: no `values` were given
        return logprobs

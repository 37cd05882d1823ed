"""Attention over packed micro-batches with shared prompts, as a Megatron-Core `core_attention` module.

Megatron-Core's local attention has no packed sequences, and no stock attention lets the responses of a group share
their prompt's keys and values. This module takes the micro-batch's `SegmentTree` instead of a mask.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from real_megatron.batch.context import Exchange
from real_megatron.batch.segments import SegmentTree
from real_megatron.batch.shards import TokenShard
from real_megatron.head import GatherRows
from real_megatron.hf.rotary import Rotary
from real_megatron.policy.context import gather_keys_values
from real_megatron.policy.flex import flex_segment_attention
from real_megatron.policy.runs import runs_of


@dataclass(frozen=True)
class HeadRows:
    """The rows of a micro-batch that reach the output head."""

    positions: Tensor
    """The token of each row, int64 `[R]`."""
    ids: GatherRows
    """Vocabulary ids asked of each row."""
    tokens: int
    """How many rows, the first ones, are those of sampled tokens; the others are of answers."""
    temperature: float
    """Of the token rows' log-probs; those of answers are at temperature 1."""


@dataclass(kw_only=True)
class PackedParams(PackedSeqParams):
    """What a micro-batch's forward pass needs beside token ids.

    It travels through Megatron's `packed_seq_params`, which every layer and the output head receive, also when
    activations are recomputed. The format is not `thd`: Megatron then treats the packed tokens as one sequence, and
    leaves attention and positions to this package.
    """

    qkv_format: str = "bshd"
    tree: SegmentTree
    head_rows: HeadRows | None = None
    """None: full logits of all tokens instead."""
    exchange: Exchange | None = None
    """Where context-parallel ranks run the micro-batch together, with its tensors on the device; None: one rank."""


class PackedAttention(nn.Module):
    """Grouped-query attention under a `SegmentTree`.

    windows: per layer of the whole model, the number of keys a query sees at most (itself included), or None.
    rotary: what has rotated queries and keys. Megatron has not applied its `scaling`, which is done here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        windows: tuple[int | None, ...] = (),
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = windows[layer_number - 1] if windows else None
        # Of queries and of keys: their products have its square.
        self.rotary_scale = rotary.scaling**2 if rotary else 1.0
        self.rotary_dim = rotary.dim if rotary else 0

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        *,
        packed_seq_params: PackedParams,
    ) -> Tensor:
        """query `[T, 1, heads, d]`, key and value `[T, 1, kv_heads, d]` → `[T, 1, heads · d]`.

        T counts this rank's tokens; under context parallelism they attend to those of the other ranks as well.
        """
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        scale = self.scale
        if self.rotary_dim == query.size(-1):
            scale *= self.rotary_scale
        elif self.rotary_scale != 1:
            rotated, rest = query.tensor_split([self.rotary_dim], dim=-1)
            query = torch.cat((rotated * self.rotary_scale, rest), dim=-1)
        exchange, shard = packed_seq_params.exchange, None
        if exchange is not None:
            key, value = gather_keys_values(key, value, exchange.token_slots)
            shard = exchange.shard
        else:  # values as they come are a view, for which backward would keep the whole output of the projection
            value = value.contiguous()
        attend = attention_on(query.device)
        out = attend(query, key, value, packed_seq_params.tree, scale, self.window, shard)
        return out.reshape(out.size(0), 1, -1)


def attention_on(device: torch.device) -> Callable[..., Tensor]:
    """The function that computes attention on a device: `flex_segment_attention` or `segment_attention`."""
    return flex_segment_attention if device.type == "cuda" else segment_attention


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: SegmentTree,
    scale: float,
    window: int | None = None,
    shard: TokenShard | None = None,
) -> Tensor:
    """Attention run by run (`runs_of`) through torch's scaled_dot_product_attention.

    query `[T of the shard, heads, d]` (without a shard: all T), key and value `[T, kv_heads, d]` → the query's shape.
    `split` (rather than indexing) keeps the backward pass linear in T.
    """
    calls = runs_of(tree, query.size(1) * query.size(2), window, shard, query.device)
    queries = query.transpose(0, 1).split([run.end - run.first for run in calls.runs], dim=1)
    keys, values = (x.transpose(0, 1).split(calls.lengths, dim=1) for x in (key, value))
    outputs = []
    for q, run in zip(queries, calls.runs, strict=True):
        k, v = (_taken(pieces, run.pieces) for pieces in (keys, values))
        outputs.append(
            F.scaled_dot_product_attention(
                q[None],
                k[None],
                v[None],
                attn_mask=run.mask,
                is_causal=run.mask is None,
                scale=scale,
                enable_gqa=q.size(0) > k.size(0),
            )[0]
        )
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _taken(pieces: Sequence[Tensor], wanted: Sequence[tuple[int, int]]) -> Tensor:
    """The first so many tokens of each of these pieces, one after the other."""
    parts = [pieces[i][:, :length] for i, length in wanted]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

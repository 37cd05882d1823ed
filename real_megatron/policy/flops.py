"""Model FLOPs of a micro-batch: the matrix products that the mathematics needs, whatever the machine recomputes."""

from collections import Counter

import torch
from torch import Tensor

from real_megatron import hardware
from real_megatron.batch.segments import SegmentTree
from real_megatron.bridge import ModelDescription


def linear_flops(description: ModelDescription) -> float:
    """Forward FLOPs per token of all layers' weight products, attention scores and output head excluded.

    A mixture of experts counts the experts that a token visits.
    """
    config = description.transformer_config
    hidden, width = description.hidden_size, description.num_heads * description.head_dim
    attention = hidden * (width + 2 * description.num_groups * description.head_dim) + width * hidden
    total = 0.0
    for layer in range(description.num_layers):
        if description.is_moe_layer(layer):
            mlp = (
                config["moe_router_topk"] * 3 * hidden * config["moe_ffn_hidden_size"]
                + hidden * description.num_experts
            )
        else:
            mlp = 3 * hidden * config["ffn_hidden_size"]
        total += 2.0 * (attention + mlp)
    return total


def attention_flops(description: ModelDescription, tree: SegmentTree) -> float:
    """Forward FLOPs of QKᵀ and PV over all layers, counting only the pairs that the mask admits."""
    windows = description.sliding_window
    pairs = {window: tree.attention_pairs(window) for window in set(windows)}
    return 4.0 * description.num_heads * description.head_dim * sum(pairs[window] for window in windows)


def head_flops(description: ModelDescription) -> float:
    """Forward FLOPs of the output layer per row that reaches it."""
    return 2.0 * description.hidden_size * description.vocab_size


def uneven_flops(description: ModelDescription, tree: SegmentTree, row_positions: Tensor) -> Tensor:
    """Forward FLOPs of each token in which tokens differ: attention and the output head, float64 `[T]`.

    row_positions: the token of each row that reaches the head, int64 `[R]`. All tokens take `linear_flops` besides.
    """
    seen = tree.positions().double() + 1
    flops = torch.zeros_like(seen)
    for window, layers in Counter(description.sliding_window).items():
        flops += layers * (seen if window is None else seen.clamp(max=window))
    flops *= 4.0 * description.num_heads * description.head_dim
    return flops.index_add(0, row_positions, flops.new_full(row_positions.shape, head_flops(description)))


def training_flops(description: ModelDescription, tree: SegmentTree, rows: int) -> float:
    """Forward and backward FLOPs of one micro-batch (backward is twice the forward), padding included."""
    forward = linear_flops(description) * tree.total + attention_flops(description, tree)
    return 3.0 * (forward + head_flops(description) * rows)


def peak_flops(device: torch.device) -> float | None:
    """Peak bfloat16 FLOP/s of a GPU, for MFU; None on CPU and on GPUs that the table does not know."""
    if device.type != "cuda":
        return None
    return hardware.peak_flops(torch.cuda.get_device_name(device))

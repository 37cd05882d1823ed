"""transformers' output layer with float32 logits over 16-bit weights, as the policy's linear head computes them."""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from real_megatron.head.gemm import mm

logger = logging.getLogger(__name__)

# Without a GPU the product takes float32 copies of the weights, a chunk of rows at a time. Measured: chunks of 4 MiB,
# which stay in a core's cache, are the fastest.
_CPU_CHUNK_BYTES = 4 << 20


class Float32Head(nn.Linear):
    """logits = hidden @ weightᵀ: 16-bit `[..., H]` and `[V, H]` → float32 `[..., V]`.

    Products of 16-bit numbers are exact in float32, and so the logits are as good as float32 sums of H terms are.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        rows, weight = hidden.reshape(-1, self.in_features), self.weight
        logits = rows.new_empty(rows.shape[0], self.out_features, dtype=torch.float32)
        chunk = self.out_features if rows.is_cuda else max(1, _CPU_CHUNK_BYTES // (4 * self.in_features))
        for start in range(0, self.out_features, chunk):
            mm(rows, weight[start : start + chunk].t(), out=logits[:, start : start + chunk])
        if self.bias is not None:
            logits += self.bias
        return logits.view(*hidden.shape[:-1], self.out_features)


def use_float32_logits(model: PreTrainedModel) -> None:
    """Have a model of 16-bit weights return float32 logits instead of rounded ones; one of wider weights stays as it
    is. The weights, tied or not, stay where they are, and keep their names."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        logger.warning("%s: the output layer is a %s; its logits have its own dtype", type(model), type(head))
    elif head.weight.element_size() < 4:
        head.__class__ = Float32Head

"""A vLLM worker extension for CPUs: the output layer is read from its weights, not from a copy of them.

vLLM 0.32 packs the output layer for its CPU kernels when it loads a model, and packs a layer that is tied to the
embedding never again: after a reload such a model has the new body and the first output layer, and the server answers
200. Without the packed copy the layer's product is torch's own.

For the server's own environment, by `--worker-extension-cls vllm_cpu_head.LiveHead`. A worker imports this file before
it loads the model.
"""

import torch
from vllm.model_executor.layers import vocab_parallel_embedding


def _keep_unpacked(self, layer) -> None:
    layer.cpu_linear = torch.nn.functional.linear


vocab_parallel_embedding.UnquantizedEmbeddingMethod.process_weights_after_loading = _keep_unpacked


class LiveHead:
    """Named on the command line; adds nothing to the worker."""

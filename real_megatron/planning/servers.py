"""Rollout servers: where they are, and what their weights and KV cache take."""

from dataclasses import dataclass

from real_megatron.bridge import ModelDescription
from real_megatron.planning.shapes import shapes

_BYTES = 2  # of a weight, and of a value in the KV cache: bfloat16


@dataclass(frozen=True)
class Servers:
    """The servers of a run."""

    gpus: int
    """GPUs that serve: all of the trainer's or some of them where colocated, else further ones."""
    tensor: int
    """GPUs of one server (its tensor-parallel size), `rollout.tensor` where they are local."""
    colocated: bool = False
    """`rollout.colocate`."""
    staleness: int = 0
    """`rollout.staleness`: 1 generates while the policy trains."""
    concurrency: int = 64
    """Requests in flight per server, `rollout.concurrency`; a request asks for all responses of a prompt."""
    keep_weights: bool = True
    """`rollout.keep_weights`: each sync also copies the weights to host memory."""

    @property
    def count(self) -> int:
        """How many servers."""
        return self.gpus // self.tensor


def server_memory(description: ModelDescription, tensor: int) -> float:
    """Bytes of the weights on each GPU of a server in bfloat16. Beyond one key and value head a GPU these are copied.

    Norms, biases and routers are left out, less than 0.1 % of any model.
    """
    weights = shapes(description)
    copies = max(1.0, tensor / description.num_groups) - 1
    return _BYTES * (weights.total + copies * weights.keys) / tensor


def kv_bytes_per_token(description: ModelDescription, tensor: int) -> float:
    """Bytes of the KV cache per token on each GPU of a server, all layers with full attention, in bfloat16."""
    heads = max(1.0, description.num_groups / tensor)
    return 2.0 * _BYTES * description.num_layers * heads * description.head_dim

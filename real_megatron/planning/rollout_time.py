"""Seconds of a step's rollout: prefill, decoding, and the wait for the longest responses."""

import math
from dataclasses import dataclass

from real_megatron.bridge import ModelDescription
from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import DEFAULT, Efficiency
from real_megatron.planning.links import Group, group
from real_megatron.planning.servers import Servers, kv_bytes_per_token, server_memory
from real_megatron.planning.shapes import Shapes, shapes
from real_megatron.planning.workload import Workload

_INTERVALS = 24
"""Of the last wave, over the length of the longest response."""
_TAIL = 0.25
"""Fewer sequences than this share of a full batch are the wait for the longest."""


def rollout_time(
    description: ModelDescription, workload: Workload, gpu: Gpu, servers: Servers, efficiency: Efficiency = DEFAULT
) -> dict[str, float]:
    """Seconds by part of the busiest server; infinite where its GPUs have no memory for a single sequence.

    Of n sequences that start together, n (1 − x/M)^(M/R − 1) are longer than x tokens: their mean is R, the longest has
    M = max_response_tokens. Prompts have the mean length and are computed once per group.
    """
    server = _Server(
        description,
        gpu,
        servers,
        efficiency,
        shapes(description),
        server_memory(description, servers.tensor),
        kv_bytes_per_token(description, servers.tensor),
        group(gpu, efficiency, 1, servers.tensor),
    )
    prompts = math.ceil(workload.prompts / servers.count)
    sequences = prompts * workload.responses
    mean, longest = workload.response_tokens, float(max(workload.max_response_tokens, workload.response_tokens))
    shape = longest / mean - 1
    # The mean length so far of the sequences that run, in a batch whose places are taken again at once.
    so_far = longest / (shape + 2)
    room = server.tokens / (workload.prompt_tokens / workload.responses + so_far)
    places = min(servers.concurrency * workload.responses, room)
    if places < 1:
        return {"decoding": math.inf}
    batch = min(float(sequences), places)
    decoding = (sequences - batch) * mean / batch * server.step(batch, workload.prompt_tokens + so_far)
    tail = 0.0
    for interval in range(_INTERVALS):
        reached = (interval + 0.5) / _INTERVALS
        running = max(1.0, batch * (1 - reached) ** shape)
        steps = longest / _INTERVALS
        seconds = steps * server.step(running, workload.prompt_tokens + reached * longest)
        if running < _TAIL * batch:
            tail += seconds
        else:
            decoding += seconds
    return {
        "prefill": server.prefill(prompts, workload.prompt_tokens),
        "decoding": decoding,
        "waiting for the longest responses": tail,
    }


@dataclass(frozen=True)
class _Server:
    description: ModelDescription
    gpu: Gpu
    servers: Servers
    efficiency: Efficiency
    weights: Shapes
    weight_bytes: float
    """On each GPU."""
    kv_bytes: float
    """Per token on each GPU."""
    ranks: Group

    @property
    def tokens(self) -> float:
        """Tokens that the KV cache of the server holds."""
        return max(0.0, self.gpu.memory * self.efficiency.server_memory - self.weight_bytes) / self.kv_bytes

    def step(self, batch: float, context: float) -> float:
        """Seconds of one decoding step of `batch` sequences with `context` tokens each."""
        description, weights, tensor = self.description, self.weights, self.servers.tensor
        # A batch visits some of the experts: each with probability 1 − (1 − k/E)^batch if all are equally likely.
        untouched = 0.0
        if weights.moe_layers:
            share = description.transformer_config["moe_router_topk"] / description.num_experts
            untouched = 2.0 * weights.experts * (1 - share) ** batch / tensor
        embedding = 0 if description.tied else description.vocab_size * description.hidden_size
        read = self.weight_bytes - untouched - 2.0 * embedding / tensor + batch * context * self.kv_bytes
        memory = read / (self.gpu.bandwidth * self.efficiency.decode_memory)
        flops = 2.0 * batch * (weights.active + description.vocab_size * description.hidden_size) / tensor
        compute = flops / (self.gpu.flops * self.efficiency.decode_gemm)
        seconds = max(memory, compute) + self.efficiency.decode_step + batch * self.efficiency.decode_sequence
        if tensor > 1:
            calls = 2.0 * weights.layers
            latency = self.efficiency.network_latency if self.ranks.between_nodes else self.efficiency.reduce_latency
            seconds += calls * latency + self.ranks.gather(2.0 * calls * 2.0 * batch * description.hidden_size, 0)
        return seconds

    def prefill(self, prompts: int, length: float) -> float:
        """Seconds of `prompts` prompts of `length` tokens."""
        description = self.description
        pairs = length * (length + 1) / 2 * description.num_layers
        attention = 4.0 * description.num_heads * description.head_dim * pairs
        flops = prompts * (2.0 * self.weights.active * length + attention) / self.servers.tensor
        return flops / (self.gpu.flops * self.efficiency.decode_gemm)

"""Seconds of the policy's own work in a step: updates, and forward passes for log-probs."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from real_megatron.hardware import Gpu
from real_megatron.planning.efficiency import DEFAULT, Efficiency
from real_megatron.planning.links import Group, group
from real_megatron.planning.microbatches import Microbatches, microbatches
from real_megatron.planning.shapes import Shapes, shapes
from real_megatron.planning.workload import Layout, Workload
from real_megatron.policy.stages import layers_of_chunks

_ADAM_BYTES = 30
"""Of HBM traffic per weight of an Adam update: reads gradient, weight and both moments in float32 and writes the last
three, 28; writes the bfloat16 weight, 2."""


def update_time(
    layout: Layout, workload: Workload, gpu: Gpu, efficiency: Efficiency = DEFAULT
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by part: of a step's optimizer updates, and of its further forward passes, on the busiest ranks.

    The further passes are `workload.forward_passes`, and a scoring pass where groups exceed batch.max_tokens.
    """
    model = _Model.of(layout, gpu, efficiency)
    batch = microbatches(layout, workload, workload.updates)
    update = model.passes(batch, backward=True)
    update.update(model.gradients(batch, update))
    passes = workload.forward_passes + (1 if workload.generates and batch.split > 1 else 0)
    forward = model.passes(microbatches(layout, workload, 1), backward=False) if passes else {}
    return _scaled(update, workload.updates), _scaled(forward, passes)


def bubble(pipeline: int, virtual_pipeline: int | None, count: int) -> float:
    """Time of a pipeline's bubble over the time of its `count` micro-batches on one stage (arXiv 2104.04473, 2.2)."""
    return (pipeline - 1) / ((virtual_pipeline or 1) * count)


def gemm_efficiency(efficiency: Efficiency, rows: float, width: float) -> float:
    """Share of the peak that a matrix product of `rows` × `width` results reaches."""
    return efficiency.gemm * rows / (rows + efficiency.gemm_rows) * width / (width + efficiency.gemm_width)


def _scaled(parts: Mapping[str, float], factor: float) -> dict[str, float]:
    return {name: seconds * factor for name, seconds in parts.items() if seconds * factor > 0}


@dataclass(frozen=True)
class _Model:
    """A layout on a GPU, with its groups of ranks."""

    layout: Layout
    gpu: Gpu
    efficiency: Efficiency
    weights: Shapes
    tensor: Group
    context: Group
    expert: Group
    stages: Group

    @classmethod
    def of(cls, layout: Layout, gpu: Gpu, efficiency: Efficiency) -> "_Model":
        parallel = layout.parallel
        return cls(
            layout,
            gpu,
            efficiency,
            shapes(layout.description),
            tensor=group(gpu, efficiency, 1, parallel.tensor),
            context=group(gpu, efficiency, parallel.tensor, parallel.context),
            expert=group(gpu, efficiency, parallel.tensor, parallel.expert),
            stages=group(gpu, efficiency, layout.world // parallel.pipeline, parallel.pipeline),
        )

    @property
    def layers(self) -> list[int]:
        """Layers of each pipeline rank."""
        pipeline = self.layout.parallel.pipeline
        chunks = layers_of_chunks(self.weights.layers, self.layout.parallel)
        return [sum(map(len, chunks[rank::pipeline])) for rank in range(pipeline)]

    def passes(self, batch: Microbatches, backward: bool) -> dict[str, float]:
        """Forward passes of all micro-batches on the slowest stage, with their backward passes or without."""
        parallel, recompute = self.layout.parallel, self.layout.model.recompute
        again = 1.0 if recompute == "full" else 0.0
        whole: dict[str, float] = defaultdict(float)
        for name, seconds in self.computation(batch).items():
            whole[name] += seconds * (3.0 if backward else 1.0)
            if backward:
                whole["recomputation"] += seconds * (1.0 if recompute == "selective" and name == "attention" else again)
        for name, seconds in self.communication(batch).items():
            # Backward has the mirror image of each collective; sequence parallelism gathers its inputs once more.
            extra = 0.5 if parallel.sequence_parallel and name.startswith("tensor parallelism") else 0.0
            whole[name] += seconds * (2.0 + extra + again if backward else 1.0)
        head = self.head(batch, backward)
        most, last = max(self.layers) / self.weights.layers, self.layers[-1] / self.weights.layers
        layers = sum(whole.values())
        if layers * most > layers * last + head:  # another stage is slower than the last one with its head
            last, head = most, 0.0
        parts = {name: seconds * last for name, seconds in whole.items()}
        parts["output head"] = head
        work = layers * last + head
        idle = work * bubble(parallel.pipeline, parallel.virtual_pipeline, batch.count)
        parts["pipeline bubble"] = idle
        parts[f"messages of pipeline stages {self.stages.where}"] = self.messages(batch, 2 if backward else 1)
        # What the busiest rank has beyond the mean, the others wait for.
        parts["waiting for the busiest rank"] = (work + idle) * (self.efficiency.imbalance - 1)
        return parts

    def computation(self, batch: Microbatches) -> dict[str, float]:
        """Forward seconds of all layers on one rank as if it had all of them."""
        description, parallel = self.layout.description, self.layout.parallel
        config, weights, efficiency = description.transformer_config, self.weights, self.efficiency
        ranks = parallel.context * parallel.tensor
        tokens = batch.tokens / parallel.context
        rows = tokens / batch.count
        visited = 2.0 * weights.visited * batch.tokens
        width = description.num_heads * description.head_dim / parallel.tensor
        dense = (batch.linear_flops - visited) / ranks
        parts = {
            "matrix products": dense / (self.gpu.flops * gemm_efficiency(efficiency, rows, width)),
            "attention": batch.attention_flops / ranks / (self.gpu.flops * efficiency.attention),
            "memory-bound kernels": self.traffic(tokens) / (self.gpu.bandwidth * efficiency.memory),
        }
        if weights.moe_layers:
            topk, count = config["moe_router_topk"], description.num_experts
            expert_rows = rows * parallel.expert * topk / count
            reached = gemm_efficiency(efficiency, expert_rows, config["moe_ffn_hidden_size"] / parallel.tensor)
            seconds = visited / ranks / (self.gpu.flops * reached)
            parts["experts' matrix products"] = seconds * efficiency.expert_imbalance
        busy = sum(parts.values())
        hidden = max(0.0, batch.count * (weights.layers - weights.moe_layers) * efficiency.launch - busy)
        parts["launching kernels"] = hidden
        parts["routing on the host"] = batch.count * weights.moe_layers * efficiency.moe_launch
        return parts

    def traffic(self, tokens: float) -> float:
        """Bytes that a forward pass over `tokens` moves between kernels of all layers on one rank."""
        description, parallel, weights = self.layout.description, self.layout.parallel, self.weights
        config, hidden = description.transformer_config, description.hidden_size
        shared = parallel.tensor if parallel.sequence_parallel else 1
        # Two norms and two residual additions, 10 times the hidden state; rotary embedding, twice queries and keys;
        # SwiGLU, three times its width; tokens of experts, sorted and put back, four times the hidden state each.
        values = 10.0 * hidden / shared * weights.layers
        heads = description.num_heads + 2 * description.num_groups
        values += 4.0 * heads * description.head_dim / parallel.tensor * weights.layers
        dense = weights.layers - weights.moe_layers
        if dense:
            values += 3.0 * config["ffn_hidden_size"] / parallel.tensor * dense
        if weights.moe_layers:
            copies = config["moe_router_topk"] * weights.moe_layers
            values += copies * (3.0 * config["moe_ffn_hidden_size"] / parallel.tensor + 4.0 * hidden / parallel.tensor)
        return 2.0 * values * tokens

    def communication(self, batch: Microbatches) -> dict[str, float]:
        """Seconds of the collectives of a forward pass through all layers."""
        description, parallel, weights = self.layout.description, self.layout.parallel, self.weights
        config, hidden, layers = description.transformer_config, description.hidden_size, weights.layers
        moe_layers = weights.moe_layers
        tokens = batch.tokens / parallel.context
        parts: dict[str, float] = defaultdict(float)
        # Attention and dense MLP: an all-reduce each, or with sequence parallelism its two halves.
        blocks = layers + (layers - moe_layers)
        calls = 2.0 * blocks * batch.count
        parts[f"tensor parallelism {self.tensor.where}"] = self.tensor.gather(
            2.0 * blocks * 2.0 * hidden * tokens, calls
        )
        keys = 2.0 * description.num_groups * description.head_dim / min(parallel.tensor, description.num_groups)
        parts[f"context parallelism {self.context.where}"] = self.context.gather(
            2.0 * keys * batch.tokens * layers, layers * batch.count
        )
        if moe_layers:
            copies = 2.0 * hidden * config["moe_router_topk"] * moe_layers
            calls = 2.0 * moe_layers * batch.count
            imbalance = self.efficiency.expert_imbalance
            parts[f"all-to-all {self.expert.where}"] = self.expert.all_to_all(
                2.0 * copies * tokens / parallel.tensor * imbalance, calls
            )
            # Each expert is sharded over the tensor-parallel ranks, which gather its tokens and add up its results.
            parts[f"tensor parallelism {self.tensor.where}"] += self.tensor.gather(
                2.0 * copies * tokens * imbalance, calls
            )
        return parts

    def head(self, batch: Microbatches, backward: bool) -> float:
        """Seconds of the output head on the last stage. Its linear form computes the logits again in backward."""
        parallel = self.layout.parallel
        rows = batch.rows / parallel.context / batch.count
        width = self.layout.description.vocab_size / parallel.tensor
        if not rows:
            return 0.0
        reached = self.gpu.flops * gemm_efficiency(self.efficiency, rows, width)
        times = 1.0
        if backward:
            times = 3.0 if self.layout.model.head == "logits" else 4.0
        return times * batch.head_flops / (parallel.context * parallel.tensor) / reached

    def messages(self, batch: Microbatches, directions: int) -> float:
        """Seconds of a stage's messages that no computation hides."""
        parallel = self.layout.parallel
        shared = parallel.tensor if parallel.sequence_parallel else 1
        chunks = parallel.virtual_pipeline or 1
        size = 2.0 * self.layout.description.hidden_size * batch.tokens / (parallel.context * shared)
        seconds = directions * chunks * self.stages.send(size, batch.count)
        return seconds * (1 - self.efficiency.message_overlap) if chunks > 1 else seconds

    def gradients(self, batch: Microbatches, update: Mapping[str, float]) -> dict[str, float]:
        """Reduction of gradients beyond what the last backward pass hides, optimizer, all-gather of the weights."""
        layout, parallel, weights = self.layout, self.layout.parallel, self.weights
        vocabulary = layout.description.vocab_size * layout.description.hidden_size
        if parallel.pipeline == 1:
            vocabulary = weights.vocabulary
        share = max(self.layers) / weights.layers
        layers = (weights.attention + weights.mlp) * share + vocabulary
        shards = [
            (
                layers / parallel.tensor,
                group(self.gpu, self.efficiency, parallel.tensor, layout.data * parallel.context),
            ),
            (
                weights.experts * share / (parallel.tensor * parallel.expert),
                group(self.gpu, self.efficiency, parallel.tensor * parallel.expert, layout.expert_data),
            ),
        ]
        reduced = gathered = traffic = 0.0
        for count, ranks in shards:
            if not count:
                continue
            reduced += ranks.gather(4.0 * count)
            if parallel.distributed_optimizer:
                gathered += ranks.gather(2.0 * count)
                # Every rank clears all of its gradients and updates its shard of the weights.
                traffic += 4.0 * count + (_ADAM_BYTES + 4.0) * count / ranks.size
            else:
                reduced += ranks.gather(4.0 * count)
                traffic += (4.0 + _ADAM_BYTES + 4.0) * count
        where = shards[0][1].where
        last_backward = sum(update.values()) * 2 / 3 / batch.count
        hidden = last_backward * self.efficiency.gradient_overlap
        return {
            f"reducing gradients {where}": max(0.0, reduced - hidden),
            f"gathering weights {where}": gathered,
            "optimizer": traffic / (self.gpu.bandwidth * self.efficiency.memory),
        }

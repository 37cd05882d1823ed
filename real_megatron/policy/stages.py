"""Which layers each model chunk along the pipeline has, as Megatron-Core deals them out."""

from real_megatron.config import ParallelConfig


def chunk_count(parallel: ParallelConfig) -> int:
    """Model chunks along the pipeline: its ranks, or `virtual_pipeline` times as many."""
    return parallel.pipeline * (parallel.virtual_pipeline or 1)


def counted_layers(layers: int, parallel: ParallelConfig) -> int:
    """What is dealt out evenly: the layers, and what counts as a layer beside them."""
    return layers + parallel.account_for_embedding + parallel.account_for_loss


def layers_of_chunks(layers: int, parallel: ParallelConfig) -> list[range]:
    """The layers (0-based) of each chunk, in the pipeline's order. The sizes must divide (`model.check_divides`).

    Chunk i is that of pipeline rank i % pipeline.
    """
    chunks = chunk_count(parallel)
    each = counted_layers(layers, parallel) // chunks
    first = [max(0, i * each - parallel.account_for_embedding) for i in range(chunks)] + [layers]
    return [range(first[i], first[i + 1]) for i in range(chunks)]

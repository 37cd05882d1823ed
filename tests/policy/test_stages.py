"""The layers of each chunk against Megatron-Core's own functions, over all small cases."""

from itertools import product

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from real_megatron.config import ParallelConfig
from real_megatron.policy.stages import chunk_count, counted_layers, layers_of_chunks


def megatron_chunks(layers: int, parallel: ParallelConfig) -> list[range]:
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_dtype="bfloat16",
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding,
        account_for_loss_in_pipeline_split=parallel.account_for_loss,
    )
    stages = range(parallel.virtual_pipeline) if parallel.virtual_pipeline else [None]
    chunks = []
    for stage, rank in product(stages, range(parallel.pipeline)):
        first = get_transformer_layer_offset(config, stage, rank)
        chunks.append(range(first, first + get_num_layers_to_build(config, stage, rank)))
    return chunks


@pytest.mark.parametrize(("embedding", "loss"), product([False, True], repeat=2))
def test_layers_are_those_that_megatron_deals_out(embedding, loss):
    cases = 0
    for pipeline, virtual, layers in product(range(1, 6), [None, 2, 3, 4], range(1, 31)):
        if pipeline == 1 and (virtual or embedding or loss):
            continue  # refused by the configuration
        parallel = ParallelConfig(
            pipeline=pipeline,
            virtual_pipeline=virtual,
            account_for_embedding=embedding,
            account_for_loss=loss,
        )
        if counted_layers(layers, parallel) % chunk_count(parallel):
            continue  # refused by `check_divides`
        found = layers_of_chunks(layers, parallel)
        assert found == megatron_chunks(layers, parallel), parallel
        assert [layer for chunk in found for layer in chunk] == list(range(layers))
        cases += 1
    assert cases > 50

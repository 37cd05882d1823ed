"""A running Megatron model ↔ Hugging Face tensors, without a checkpoint in between.

Megatron numbers layers per model chunk and experts per rank; here every parameter has its global name.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.expansion import parameters
from real_megatron.bridge.table import Parameter, hf_shapes
from real_megatron.hf.checkpoint import HFCheckpoint

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=local_experts\.)\d+|(?<=experts\.linear_fc[12]\.weight)\d+")


def load_hf(models: Sequence[nn.Module], description: ModelDescription, hf_dir: str | Path) -> None:
    """Fill this rank's model chunks (GPTModel, wrapped or not) from a Hugging Face checkpoint directory.

    Each rank reads only its own shards; values are converted to the dtype of the parameters. Optimizers that hold
    their own copy of the weights must be built afterwards, or reloaded. Raises CheckpointError when the directory does
    not hold exactly this model.
    """
    checkpoint = HFCheckpoint(hf_dir)
    checkpoint.validate(hf_shapes(parameters(description)), description.tied)
    for parameter, tensor in local_parameters(models, description):
        rank, size = shard_of(parameter)
        shard = parameter.transform.shard(rank, size, parameter.reader(checkpoint))
        with torch.no_grad():
            tensor.copy_(shard)


def local_parameters(models: Sequence[nn.Module], description: ModelDescription) -> Iterator[tuple[Parameter, Tensor]]:
    """This rank's tensors with their entries in the parameter table, whatever the layer spec.

    With tied embeddings the last pipeline stage's copy of the embedding is paired with the embedding's entry. Raises
    KeyError for a tensor that the table does not have, and for an entry of the table that a layer here lacks: the
    family's table does not describe the model that was built.
    """
    chunks = [unwrap(model) for model in models]
    table = {
        name: parameter
        for parameter in parameters(description, vocab_rows=chunks[0].vocab_size)
        for name in (parameter.name, parameter.te_name)
    }
    if description.tied:
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]
    found: set[str] = set()
    layers: set[int] = set()
    for chunk in chunks:
        for local_name, tensor in chunk.named_parameters():
            name = _global_name(local_name, chunk, description)
            if name not in table:
                raise KeyError(f"Megatron parameter '{name}' is not in the table of family '{description.family}'")
            found.add(table[name].name)
            yield table[name], tensor
        layers.update(layer.layer_number - 1 for layer in chunk.decoder.layers)
    experts = range(*_local_experts(description))
    for parameter in table.values():
        here = parameter.layer in layers and (parameter.expert is None or parameter.expert in experts)
        if here and parameter.name not in found:
            raise KeyError(f"the Megatron model has no parameter '{parameter.name}'")


def unwrap(model: nn.Module) -> GPTModel:
    """The GPTModel inside Megatron's DDP and mixed-precision wrappers."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def shard_of(parameter: Parameter) -> tuple[int, int]:
    """Tensor-parallel rank and size for a parameter; experts have a tensor-parallel group of their own."""
    if parameter.expert is None:
        return (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )


def _global_name(name: str, chunk: GPTModel, description: ModelDescription) -> str:
    name = _LAYER.sub(lambda match: str(chunk.decoder.layers[int(match[0])].layer_number - 1), name)
    return _EXPERT.sub(lambda match: str(int(match[0]) + _local_experts(description)[0]), name)


def _local_experts(description: ModelDescription) -> tuple[int, int]:
    """First and one past the last expert of this rank."""
    count = description.num_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * count
    return first, first + count

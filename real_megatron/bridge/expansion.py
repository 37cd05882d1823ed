"""The parameters of a model from its description alone, without building it."""

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.families import FAMILIES
from real_megatron.bridge.table import Parameter, expand


def padded_vocab(description: ModelDescription, tensor: int, multiple: int) -> int:
    """Vocabulary rows in Megatron: the next multiple of `multiple` × `tensor` (the tensor-parallel size)."""
    unit = multiple * tensor
    return (description.vocab_size + unit - 1) // unit * unit


def parameters(description: ModelDescription, vocab_rows: int | None = None) -> list[Parameter]:
    """All Megatron parameters of a model in a fixed order: embedding, layers, final norm, output layer.

    vocab_rows: rows of the vocabulary in Megatron; default: not padded.
    """
    return list(expand(FAMILIES.find(description.family).TABLE, description, vocab_rows))


def parameter_count(description: ModelDescription) -> int:
    """Number of parameters of the Hugging Face model: tied embeddings once, no vocabulary padding."""
    return sum(parameter.hf_numel for parameter in parameters(description))

"""What a user's module with model families of its own looks like: Granite's checkpoints have Llama's tensors."""

from transformers import PretrainedConfig

from real_megatron.bridge import ModelDescription, register_family
from real_megatron.bridge.families import llama


class Granite:
    """A family as an object."""

    TABLE = llama.TABLE

    def describe(self, config: PretrainedConfig) -> ModelDescription:
        return llama.describe(config)


register_family("fancy", Granite())
fancy = "not what is registered under this name"
attribute = llama
no_family = object()

"""Tiny models of every family with their odd features on, and what ranks do with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

# 131 is no multiple of anything, so the vocabulary is padded; 2 groups under TP 4 are cut inside a group.
SHARED = dict(
    vocab_size=131,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=8,
    max_position_embeddings=64,
    initializer_range=0.1,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2": dict(
        model_type="qwen2",
        intermediate_size=96,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "qwen3": dict(model_type="qwen3", intermediate_size=96, num_key_value_heads=2, head_dim=24),
    "llama3": dict(
        model_type="llama",
        intermediate_size=96,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LLAMA3_ROPE,
    ),
    "llama2": dict(
        model_type="llama",
        intermediate_size=96,
        num_key_value_heads=8,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    ),
    "mistral": dict(model_type="mistral", intermediate_size=96, num_key_value_heads=2, sliding_window=5),
    "mixtral": dict(
        model_type="mixtral", intermediate_size=40, num_key_value_heads=4, num_local_experts=4, sliding_window=5
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe",
        intermediate_size=96,
        moe_intermediate_size=40,
        num_key_value_heads=4,
        head_dim=24,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "qwen3_moe_tied": dict(
        model_type="qwen3_moe",
        intermediate_size=96,
        moe_intermediate_size=40,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        tie_word_embeddings=True,
    ),
}


def tiny_config(variant: str, **changes: Any) -> PretrainedConfig:
    """The configuration of one variant."""
    fields = {**SHARED, **VARIANTS[variant], **changes}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def tiny_model(variant: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of one variant; norms and biases are random too, so that none can be lost unnoticed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(variant, **changes), attn_implementation="eager").float()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model.eval()


def save_tiny(variant: str, directory: Path, **changes: Any) -> None:
    """Write a tiny model as a Hugging Face checkpoint."""
    tiny_model(variant, **changes).save_pretrained(directory)


TOKENS = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))


def check_layouts(cases: list[tuple[str, str, dict[str, Any], list[str]]]) -> dict[str, dict[str, Any]]:
    """Per case (label, Hugging Face directory, parallel sizes, Megatron checkpoints): build, load, run, export.

    Returns per label: the largest logit difference to transformers after loading from the Hugging Face directory, and
    after loading each Megatron checkpoint; and what is wrong with the export, if anything.
    """
    from real_megatron import bridge
    from real_megatron.config import ModelConfig, ParallelConfig
    from real_megatron.policy import runtime
    from real_megatron.policy.model import build_model
    from real_megatron.policy.verify import hf_logits, load_weights, model_logits

    results = {}
    for label, hf_dir, sizes, checkpoints in cases:
        parallel = ParallelConfig(**sizes)
        runtime.initialize(parallel)
        description = bridge.describe(bridge.read_config(Path(hf_dir)))
        expected = hf_logits(hf_dir, TOKENS)
        chunks = build_model(description, parallel, ModelConfig(dtype="float32", vocab_multiple=16))

        def difference(chunks=chunks, expected=expected) -> float | None:
            logits = model_logits(chunks, TOKENS)
            return None if logits is None else (logits[..., :131] - expected).abs().max().item()

        bridge.load_hf(chunks, description, hf_dir)
        found: dict[str, Any] = {"hf": difference(), "export": _export_faults(chunks, description, hf_dir)}
        for checkpoint in checkpoints:
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
            load_weights(chunks, checkpoint)
            found[Path(checkpoint).name] = difference()
        results[label] = found
    return results


def _export_faults(chunks: list, description: Any, hf_dir: str) -> list[str]:
    """Compare the export, in buckets of every size, with the files: names, order on this rank, bits."""
    from real_megatron import bridge

    original = bridge.HFCheckpoint(hf_dir)
    order = [name for parameter in bridge.parameters(description) for name in parameter.hf]
    faults = []
    for bucket_bytes in (1, 20_000, 2**30):
        names = []
        for name, tensor in _exported(chunks, description, bucket_bytes):
            names.append(name)
            entry = original.entries[name]
            if tuple(tensor.shape) != entry.shape or not torch.equal(tensor, original.tensor(name)):
                faults.append(f"{name} differs at bucket_bytes={bucket_bytes}")
        if names != order:
            faults.append(f"names or order differ at bucket_bytes={bucket_bytes}")
    return faults


def _exported(chunks: list, description: Any, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    from real_megatron import bridge

    return bridge.export_hf(chunks, description, bucket_bytes=bucket_bytes)

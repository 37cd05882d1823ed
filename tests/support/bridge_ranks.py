"""Tiny models of every family with their odd features on, and what ranks do with them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from real_megatron.policy.norm import RMSNorm

# 131 is no multiple of anything, so the vocabulary is padded; with 2 groups, TP 4 shards inside a group.
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
# The tokens that logits are compared on go beyond the 16 positions that the model had before it was extended.
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0 + i / 4 for i in range(12)],
    long_factor=[8.0] * 12,
    original_max_position_embeddings=48,
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
        rope_parameters=YARN,
    ),
    "qwen3": dict(
        model_type="qwen3", intermediate_size=96, num_key_value_heads=2, head_dim=24, rope_parameters=LONGROPE
    ),
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
    "mistral": dict(
        model_type="mistral",
        intermediate_size=96,
        num_key_value_heads=2,
        sliding_window=5,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0),
    ),
    "mixtral": dict(
        model_type="mixtral",
        intermediate_size=40,
        num_key_value_heads=4,
        num_local_experts=4,
        sliding_window=5,
        head_dim=8,  # transformers' formula for yarn needs it, and Mixtral's configuration leaves it out
        rope_parameters=YARN | dict(mscale=2.0, mscale_all_dim=0.5),
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
        rope_parameters=YARN | dict(attention_factor=0.7, truncate=False),
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


TOKENS = torch.randint(131, (2, 24), generator=torch.Generator().manual_seed(1))


@dataclass
class Case:
    """One model at one layout.

    hf: its Hugging Face directory. logits: transformers' for TOKENS. checkpoints: Megatron checkpoints to load in turn.
    buckets: bucket sizes to export with. save: where Megatron itself is to write a checkpoint.
    """

    hf: str
    sizes: dict[str, Any]
    logits: torch.Tensor
    checkpoints: list[str] = field(default_factory=list)
    buckets: list[int] = field(default_factory=lambda: [20_000])
    save: str | None = None


@dataclass
class Findings:
    """On one rank. differences: largest logit difference by source of the weights; None where there are no logits."""

    differences: dict[str, float | None]
    export_faults: list[str]


def check_layouts(cases: list[Case]) -> list[Findings]:
    """Build each case's model, fill it from its sources in turn, run it, export it and save it."""
    from megatron.core import dist_checkpointing

    from real_megatron import bridge
    from real_megatron.config import ModelConfig, ParallelConfig
    from real_megatron.hf.side_files import read_config
    from real_megatron.policy import cpu, parallel_groups
    from real_megatron.policy.model import build_model
    from real_megatron.policy.verify import load_weights, model_logits

    results = []
    formed = None
    for case in cases:
        parallel = ParallelConfig(**case.sizes)
        # Forming process groups takes longer than all the rest of a case.
        if parallel != formed:
            parallel_groups.initialize(parallel)
            formed = parallel
        description = bridge.describe(read_config(Path(case.hf)))
        chunks = build_model(description, parallel, ModelConfig(dtype="float32", vocab_multiple=16))

        def difference(chunks=chunks, expected=case.logits) -> float | None:
            logits = model_logits(chunks, TOKENS)
            return None if logits is None else (logits[..., : expected.size(-1)] - expected).abs().max().item()

        bridge.load_hf(chunks, description, case.hf)
        differences = {"hf": difference()}
        faults = [f for size in case.buckets for f in export_faults(chunks, description, case.hf, size)]
        if case.save:
            with cpu.device_mode():
                state = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}
                if torch.distributed.get_rank() == 0:
                    Path(case.save).mkdir()
                torch.distributed.barrier()
                dist_checkpointing.save(state, case.save)
        for checkpoint in case.checkpoints:
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data.fill_(float("nan"))
            load_weights(chunks, checkpoint)
            differences[checkpoint] = difference()
        results.append(Findings(differences, faults))
    return results


def export_faults(chunks: list, description: Any, hf_dir: str, bucket_bytes: int) -> list[str]:
    """What is wrong with both exports on this rank, compared with the files: names, their order, shapes, bits, and who
    yields."""
    from real_megatron import bridge
    from real_megatron.hf.checkpoint import HFCheckpoint

    original = HFCheckpoint(hf_dir)
    names, faults = [], []
    for name, tensor in bridge.export_hf(chunks, description, bucket_bytes=bucket_bytes):
        names.append(name)
        if not torch.equal(tensor, original.tensor(name)):
            faults.append(f"{name} differs with bucket_bytes={bucket_bytes}")
    if len(names) != len(set(names)) or set(names) != set(original.entries):
        faults.append(f"names differ with bucket_bytes={bucket_bytes}")
    orders: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(orders, names)
    if orders != [names] * len(orders):
        faults.append("the order of names differs between ranks")
    first = torch.distributed.get_rank() == 0
    alone = []
    for name, tensor in bridge.export_hf(chunks, description, bucket_bytes=bucket_bytes, everywhere=False):
        alone.append(name)
        if not torch.equal(tensor, original.tensor(name)):
            faults.append(f"{name} differs with bucket_bytes={bucket_bytes} on rank 0 alone")
    if alone != (names if first else []):
        faults.append("names differ with everywhere=False")
    return faults


def save_in_newest_form(hf_dir: str, directory: str) -> None:
    """Let Megatron write a checkpoint as 0.19 does: what is not a tensor is an object `common_state`, not a file."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from real_megatron import bridge
    from real_megatron.config import ModelConfig, ParallelConfig
    from real_megatron.hf.side_files import read_config
    from real_megatron.policy import cpu, parallel_groups
    from real_megatron.policy.model import build_model

    parallel_groups.initialize(ParallelConfig())
    description = bridge.describe(read_config(Path(hf_dir)))
    (chunk,) = build_model(description, ParallelConfig(), ModelConfig(dtype="float32", vocab_multiple=16))
    bridge.load_hf([chunk], description, hf_dir)
    Path(directory).mkdir()
    with cpu.device_mode():
        state = {"model0": chunk.sharded_state_dict(), "common_state": ShardedObject("common_state", {}, (1,), (0,))}
        dist_checkpointing.save(state, directory)
    Path(directory, "common.pt").unlink(missing_ok=True)


def verify_on_one_rank(hf_path: str, megatron_path: str | None) -> tuple[float, bool]:
    """policy.verify in a world of one."""
    from real_megatron.policy.verify import verify

    result = verify(hf_path, megatron_path)
    return result.difference, result.passed


def transformer_engine_spec(hf_dir: str, layer_names: dict[int, list[str]]) -> list[str]:
    """Load and export a model whose parameters carry Transformer Engine's names, on two expert-parallel ranks.

    Transformer Engine needs a GPU, so a bare module tree stands in for its model: same names, same shapes, no forward.
    layer_names: the parameters of each layer on this rank. Returns the faults of the export.
    """
    from megatron.core import parallel_state

    from real_megatron import bridge
    from real_megatron.bridge.live import shard_of
    from real_megatron.config import ParallelConfig
    from real_megatron.hf.side_files import read_config
    from real_megatron.policy import parallel_groups

    parallel_groups.initialize(ParallelConfig(expert=2))
    description = bridge.describe(read_config(Path(hf_dir)))
    table = {name: p for p in bridge.parameters(description, vocab_rows=160) for name in (p.name, p.te_name)}
    first = parallel_state.get_expert_model_parallel_rank() * description.num_experts // 2
    model = torch.nn.Module()
    model.vocab_size = 160
    names = ["embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"]
    names += [f"decoder.layers.{layer}.{name}" for layer, inner in layer_names.items() for name in inner]
    for name in names:
        known = re.sub(r"(?<=fc[12]\.weight)\d+", lambda match: str(int(match[0]) + first), name)
        size = shard_of(table[known])[1]
        _register(model, name, torch.zeros(table[known].transform.shard_shape(size)))
    model.decoder.layers = torch.nn.ModuleList(model.decoder.layers.children())
    for number, layer in enumerate(model.decoder.layers, 1):
        layer.layer_number = number
    bridge.load_hf([model], description, hf_dir)
    return export_faults([model], description, hf_dir, 20_000)


def check_exports(hf_dir: str, layouts: list[tuple[dict[str, Any], int | None]]) -> list[tuple[list[str], int]]:
    """Faults of the exports at each layout, on a tree of parameters without a forward pass, and how often this rank
    communicates in one to rank 0.

    layouts: parallel sizes, and the expert-tensor-parallel size (None: the tensor-parallel one)
    """
    from real_megatron import bridge
    from real_megatron.config import ParallelConfig
    from real_megatron.hf.side_files import read_config
    from real_megatron.policy import parallel_groups

    description = bridge.describe(read_config(Path(hf_dir)))
    results = []
    for sizes, expert_tensor in layouts:
        parallel = ParallelConfig(**sizes)
        if expert_tensor is None:
            parallel_groups.initialize(parallel)
        else:
            parallel_groups.initialize(ParallelConfig())
            parallel_groups.end_model_groups()
            parallel_groups.form_model_groups(parallel, expert_tensor_parallel_size=expert_tensor)
        model = parameter_tree(description, vocab_rows=160)
        bridge.load_hf([model], description, hf_dir)
        faults = export_faults([model], description, hf_dir, bucket_bytes=5_000)
        with counting_communication() as calls:
            for name, tensor in bridge.export_hf([model], description, dtype=torch.bfloat16, everywhere=False):
                if tensor.dtype != torch.bfloat16:
                    faults.append(f"{name} is not of the dtype asked for")
        results.append((faults, len(calls)))
    return results


@contextmanager
def counting_communication() -> Iterator[list[str]]:
    """The names of the functions of torch.distributed by which this rank communicates, a call each."""
    calls: list[str] = []
    names = ("all_gather", "all_gather_object", "all_reduce", "batch_isend_irecv", "broadcast", "gather")

    def counted(name: str, real: Callable) -> Callable:
        def call(*args: Any, **how: Any) -> Any:
            calls.append(name)
            return real(*args, **how)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.distributed, name, counted(name, getattr(torch.distributed, name)))
        yield calls


def parameter_tree(description: Any, vocab_rows: int) -> torch.nn.Module:
    """This rank's parameters of a model under Megatron's names, zeros; stages have equally many layers."""
    from megatron.core import parallel_state

    from real_megatron import bridge
    from real_megatron.bridge.live import shard_of

    stages, stage = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    layers = description.num_layers // stages
    experts = description.num_experts // parallel_state.get_expert_model_parallel_world_size()
    model = torch.nn.Module()
    model.vocab_size = vocab_rows
    for parameter in bridge.parameters(description, vocab_rows=vocab_rows):
        name = parameter.name
        if parameter.layer is None:
            owner = 0 if name.startswith("embedding.") else stages - 1
        else:
            owner = parameter.layer // layers
            name = name.replace(f"layers.{parameter.layer}.", f"layers.{parameter.layer % layers}.")
        if parameter.expert is not None:
            if parameter.expert // experts != parallel_state.get_expert_model_parallel_rank():
                continue
            name = name.replace(f"experts.{parameter.expert}.", f"experts.{parameter.expert % experts}.")
        if owner == stage:
            _register(model, name, torch.zeros(parameter.transform.shard_shape(shard_of(parameter)[1])))
    model.decoder.layers = torch.nn.ModuleList(model.decoder.layers.children())
    for number, layer in enumerate(model.decoder.layers, 1):
        layer.layer_number = stage * layers + number
    return model


class TransformerEngineNorm(RMSNorm):
    """Our norm with the state that Transformer Engine 2 gives its own: empty without FP8, but asked for at a load."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or not state.numel()


def with_transformer_engine_norms(chunk: Any, description: Any) -> int:
    """Let a model ask for what one with Transformer Engine's norms asks for at a load, and store what it stores.

    Returns how many such norms there are. Those before attention and dense MLPs are fused into linear layers.
    """
    norms = [chunk.decoder.final_layernorm] if chunk.post_process else []
    for layer in chunk.decoder.layers:
        norms += [norm for norm in layer.self_attention.children() if isinstance(norm, RMSNorm)]
        if description.is_moe_layer(layer.layer_number - 1):
            norms.append(layer.pre_mlp_layernorm)
            # Whatever its local counterpart is stored as.
            layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    for norm in norms:
        norm.__class__ = TransformerEngineNorm
    return len(norms)


def load_with_transformer_engine_norms(hf_dir: str, megatron_dir: str) -> int:
    """Let Megatron itself load a converted checkpoint `with_transformer_engine_norms`; returns how many there are."""
    from real_megatron.bridge import describe
    from real_megatron.config import ModelConfig, ParallelConfig
    from real_megatron.hf.side_files import read_config
    from real_megatron.policy import cpu, parallel_groups
    from real_megatron.policy.megatron_versions import load_sharded
    from real_megatron.policy.model import build_model

    parallel_groups.initialize(ParallelConfig())
    description = describe(read_config(Path(hf_dir)))
    (chunk,) = build_model(description, ParallelConfig(), ModelConfig(dtype="float32", vocab_multiple=16))
    norms = with_transformer_engine_norms(chunk, description)
    with cpu.device_mode():
        chunk.load_state_dict(load_sharded({"model0": chunk.sharded_state_dict()}, megatron_dir)["model0"], strict=True)
    return norms


def continue_with_norms_of(spec: str, config: Any, read: Path | None, write: Path | None) -> Any:
    """`save_and_continue` (into `write`) or `load_and_continue` (from `read`), with the names of a layer spec."""
    from real_megatron.policy import policy
    from tests.support.policy_ranks import load_and_continue, save_and_continue

    real_build = policy.build_model

    def build(description: Any, *args: Any) -> list[Any]:
        chunks = real_build(description, *args)
        if spec == "transformer_engine":
            assert all([with_transformer_engine_norms(chunk, description) for chunk in chunks])
        return chunks

    policy.build_model = build
    try:
        return save_and_continue(config, write) if write else load_and_continue(config, read)[1]
    finally:
        policy.build_model = real_build


def _register(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    module.register_parameter(last, torch.nn.Parameter(tensor))


def train_and_save(configs: list[Any], directory: str | None) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Two steps at each configuration: losses and exported weights. The last one may write a training checkpoint."""
    from real_megatron.objective import build_objective
    from tests.support.policy_ranks import make_groups, make_policy

    results = []
    for config in configs:
        policy = make_policy(config)
        objective = build_objective(config.objective)
        losses = [policy.train_step(make_groups(seed=step), objective)["loss"] for step in range(2)]
        results.append((losses, {name: tensor.clone() for name, tensor in policy.export()}))
    if directory is not None:
        policy.save(directory, {})
    return results if torch.distributed.get_rank() == 0 else []

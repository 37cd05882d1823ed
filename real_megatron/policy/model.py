"""The Megatron-Core model of a judge: packed attention, positions from the micro-batch, and our head."""

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from real_megatron import bridge
from real_megatron.bridge import ModelDescription, padded_vocab
from real_megatron.bridge.description import divisors, one_of
from real_megatron.config import ModelConfig, ParallelConfig, RunConfig
from real_megatron.errors import ConfigError
from real_megatron.hf.side_files import read_config
from real_megatron.policy import cpu, megatron_versions
from real_megatron.policy.judge_head import JudgeHead
from real_megatron.policy.layers import block_spec
from real_megatron.policy.megatron_versions import GPTModelWithHead
from real_megatron.policy.stages import chunk_count, counted_layers
from real_megatron.runtime import default_dtype


class JudgeModel(JudgeHead, GPTModelWithHead):
    """GPTModel with a judge's head and positions."""

    @staticmethod
    def layer_arguments(
        config: TransformerConfig, description: ModelDescription, model: ModelConfig, vp_stage: int | None
    ) -> dict[str, Any]:
        """The arguments that say which layers there are."""
        return {"transformer_layer_spec": block_spec(config, description, model, vp_stage)}


def build_model(description: ModelDescription, parallel: ParallelConfig, model: ModelConfig) -> list[JudgeHead]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), with all weights zero: the bridge fills them.

    `parallel_groups.initialize` must have formed Megatron's groups. Raises ConfigError as `check_divides` does, and for
    a `model.megatron_class` that the installed Megatron-Core does not have.
    """
    check_divides(description, parallel)
    config = transformer_config(description, parallel, model)
    judge = _judge_class(model, parallel)
    chunks = []
    with cpu.device_mode():
        for stage in range(parallel.virtual_pipeline or 1):
            vp_stage = stage if parallel.virtual_pipeline else None
            chunk = judge(
                config=config,
                **judge.layer_arguments(config, description, model, vp_stage),
                vocab_size=padded_vocab(description, parallel.tensor, model.vocab_multiple),
                max_sequence_length=description.max_positions,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=description.tied,
                vp_stage=vp_stage,
                description=description,
                model=model,
            )
            for parameter in chunk.parameters():
                parameter.data.zero_()
            chunks.append(chunk.to(config.params_dtype).to(torch.cuda.current_device()))
    return chunks


def _judge_class(model: ModelConfig, parallel: ParallelConfig) -> Any:
    """JudgeModel or HybridJudgeModel."""
    if model.megatron_class == "GPTModel":
        return JudgeModel
    if parallel.account_for_embedding or parallel.account_for_loss:
        raise ConfigError(
            "parallel.account_for_embedding and account_for_loss are GPTModel's: switch them off, or set "
            "model.megatron_class to GPTModel"
        )
    megatron_versions.require_hybrid_model()
    from real_megatron.policy.hybrid import HybridJudgeModel

    return HybridJudgeModel


def check_model(config: RunConfig, model_dir: Path) -> ModelDescription:
    """The description of the model of a run, after checks that need config.json alone. Raises ConfigError as
    `check_divides` does and for `data` that admits longer sequences than the rotary embedding, UnsupportedModel and
    CheckpointError for a checkpoint that cannot be trained."""
    description = bridge.describe(read_config(model_dir), config.model.family)
    check_divides(description, config.parallel)
    longest = config.data.max_prompt_tokens + config.data.max_response_tokens
    description.rotary.check_length("data.max_prompt_tokens + data.max_response_tokens", longest)
    return description


def check_divides(description: ModelDescription, parallel: ParallelConfig) -> None:
    """Raise ConfigError for parallel sizes that do not divide the model."""
    config = description.transformer_config
    dense = not all(map(description.is_moe_layer, range(description.num_layers)))
    tensor = description.tensor_sizes
    layers = counted_layers(description.num_layers, parallel)
    what = (
        "layers"
        if layers == description.num_layers
        else "layers (with those that parallel.account_for_embedding and parallel.account_for_loss add)"
    )
    sizes = [
        ("parallel.pipeline × parallel.virtual_pipeline", chunk_count(parallel), what, layers, divisors(layers)),
        ("parallel.tensor", parallel.tensor, "attention heads", description.num_heads, tensor),
        ("parallel.tensor", parallel.tensor, "neurons of an MLP", config["ffn_hidden_size"] if dense else 0, tensor),
        ("parallel.tensor", parallel.tensor, "neurons of an expert", config.get("moe_ffn_hidden_size") or 0, tensor),
        ("parallel.expert", parallel.expert, "experts", description.num_experts, divisors(description.num_experts)),
    ]
    for key, size, things, count, works in sizes:
        if count % size:
            raise ConfigError(f"{key} = {size} does not divide the model's {count} {things}: {one_of(works)}")
    groups = description.num_groups
    if groups % parallel.tensor and parallel.tensor % groups:
        raise ConfigError(
            f"parallel.tensor = {parallel.tensor} is neither a divisor nor a multiple of the model's {groups} key and "
            f"value heads: {one_of(tensor)}"
        )
    if parallel.expert > 1 and not description.num_experts:
        raise ConfigError(f"parallel.expert = {parallel.expert}: the model has no experts, set it to 1")


def transformer_config(
    description: ModelDescription, parallel: ParallelConfig, model: ModelConfig
) -> TransformerConfig:
    """The architecture of `description` with this run's parallelism, precision and recomputation."""
    dtype = default_dtype(model.dtype)
    on_gpu = torch.cuda.is_available()
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=model.recompute_layers
        )
    elif model.recompute == "selective":
        recompute = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    return TransformerConfig(
        **description.transformer_config,
        **recompute,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding,
        account_for_loss_in_pipeline_split=parallel.account_for_loss,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Micro-batches are packed to different lengths; the stages tell each other.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # The objective divides by the global batch's totals itself: gradients are summed, not averaged.
        calculate_per_token_loss=True,
        # The interleaved schedule between two ranks needs messages in flight one by one: in a batch, forward and
        # backward messages of the same pair would be matched in the wrong order.
        overlap_p2p_comm=parallel.virtual_pipeline is not None,
        batch_p2p_comm=parallel.virtual_pipeline is None,
        use_cpu_initialization=not on_gpu,
        # Initialisation also marks which weights are tensor-parallel, on which the gradient norm depends: it must run,
        # but the values come from the bridge.
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def _leave_uninitialized(weight: Tensor) -> Tensor:
    return weight

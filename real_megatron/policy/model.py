"""The Megatron-Core model of a judge: GPTModel with packed attention, positions from the micro-batch, and our head."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from real_megatron.bridge import ModelDescription, padded_vocab
from real_megatron.config import ModelConfig, ParallelConfig
from real_megatron.errors import ConfigError
from real_megatron.head import gathered_log_softmax, linear_gathered_log_softmax
from real_megatron.policy import cpu, rope
from real_megatron.policy.attention import HeadRows, PackedAttention
from real_megatron.policy.megatron_versions import GPTModelWithHead
from real_megatron.policy.norm import RMSNorm
from real_megatron.policy.parallel_groups import has_transformer_engine
from real_megatron.runtime import default_dtype


class JudgeModel(GPTModelWithHead):
    """GPTModel whose forward returns gathered log-softmax values instead of logits, with positions that restart inside
    a micro-batch."""

    def __init__(
        self,
        *args: Any,
        description: ModelDescription,
        head: str,
        head_memory_bytes: int,
        fp32_logits: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self.true_vocab_size = description.vocab_size
        self.head_form = head
        self.head_memory_bytes = head_memory_bytes
        self.fp32_logits = fp32_logits
        self.frequencies = rope.inverse_frequencies(description.hf_config)

    def rotary(self, position_ids: Tensor) -> Tensor:
        """See GPTModelWithHead."""
        self.frequencies = self.frequencies.to(position_ids.device)
        return rope.rotary_embedding(self.frequencies, position_ids[0])

    def head(self, hidden: Tensor, rows: HeadRows) -> Tensor:
        """hidden `[T (or T / tensor), 1, H]` → log-probs of the ids that `rows` ask for, float32 `[nnz]`.

        Tokens and rows are those of this context-parallel rank. Only `rows.positions` of the hidden states reach the
        output layer. Each rank's gradient of them covers its own vocabulary shard, and is summed over tensor-parallel
        ranks while the weight's gradient is computed, or under sequence parallelism where the rows were gathered.
        """
        sequence_parallel = self.config.sequence_parallel
        hidden = hidden[:, 0]
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        hidden = hidden.index_select(0, rows.positions)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        if self.head_form == "linear":
            return linear_gathered_log_softmax(
                hidden,
                weight,
                rows.ids,
                vocab_size=self.true_vocab_size,
                padded_vocab_size=self.vocab_size,
                group=group,
                memory_budget_bytes=self.head_memory_bytes,
                fp32_logits=self.fp32_logits,
                reduce_dhidden="none" if sequence_parallel else "all_reduce",
            )
        # What Megatron's ColumnParallelLinear runs; it would itself gather all tokens, not only these rows.
        logits = linear_with_grad_accumulation_and_async_allreduce(
            hidden,
            weight,
            bias=None,
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion,
            allreduce_dgrad=not sequence_parallel and group.size() > 1,
            sequence_parallel=False,
            tp_group=group,
        )
        logprobs = gathered_log_softmax(
            logits,
            rows.ids,
            vocab_size=self.true_vocab_size,
            padded_vocab_size=self.vocab_size,
            group=group,
            inplace_backward=True,
        )
        assert isinstance(logprobs, Tensor)  # one result: no `values` were given
        return logprobs


def build_model(description: ModelDescription, parallel: ParallelConfig, model: ModelConfig) -> list[JudgeModel]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), with all weights zero: the bridge fills them.

    `parallel_groups.initialize` must have formed Megatron's groups. Raises ConfigError as `check_divides` does.
    """
    check_divides(description, parallel)
    config = transformer_config(description, parallel, model)
    use_te = model.spec == "transformer_engine" or (model.spec == "auto" and has_transformer_engine())
    chunks = []
    with cpu.device_mode():
        for stage in range(parallel.virtual_pipeline or 1):
            vp_stage = stage if parallel.virtual_pipeline else None
            chunk = JudgeModel(
                config=config,
                transformer_layer_spec=_block_spec(config, description, use_te, vp_stage),
                vocab_size=padded_vocab(description, parallel.tensor, model.vocab_multiple),
                max_sequence_length=description.max_positions,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=description.tied,
                vp_stage=vp_stage,
                description=description,
                head="linear" if model.head == "auto" else model.head,
                head_memory_bytes=model.head_memory_mib * 2**20,
                fp32_logits=model.fp32_logits,
            )
            for parameter in chunk.parameters():
                parameter.data.zero_()
            chunks.append(chunk.to(config.params_dtype).to(torch.cuda.current_device()))
    return chunks


def check_divides(description: ModelDescription, parallel: ParallelConfig) -> None:
    """Raise ConfigError for parallel sizes that do not divide the model."""
    config = description.transformer_config
    dense = not all(map(description.is_moe_layer, range(description.num_layers)))
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    sizes = [
        ("parallel.pipeline × parallel.virtual_pipeline", stages, "layers", description.num_layers),
        ("parallel.tensor", parallel.tensor, "attention heads", description.num_heads),
        ("parallel.tensor", parallel.tensor, "neurons of an MLP", config["ffn_hidden_size"] if dense else 0),
        ("parallel.tensor", parallel.tensor, "neurons of an expert", config.get("moe_ffn_hidden_size") or 0),
        ("parallel.expert", parallel.expert, "experts", description.num_experts),
    ]
    for key, size, what, count in sizes:
        if count % size:
            raise ConfigError(f"{key} = {size} does not divide the model's {count} {what}: choose a divisor")
    groups = description.num_groups
    if groups % parallel.tensor and parallel.tensor % groups:
        raise ConfigError(
            f"parallel.tensor = {parallel.tensor} is neither a divisor nor a multiple of the model's {groups} key and "
            "value heads: choose one"
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


def _block_spec(
    config: TransformerConfig, description: ModelDescription, use_te: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Megatron's layer spec with our core attention, and our RMSNorm where the spec is the local one."""
    build = (
        get_gpt_layer_with_transformer_engine_spec
        if use_te
        else partial(get_gpt_layer_local_spec, normalization="RMSNorm")
    )
    attention = ModuleSpec(module=PackedAttention, params={"windows": description.sliding_window})
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = []
    for index in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)):
        experts = description.num_experts if description.is_moe_layer(index) else None
        layer = build(num_experts=experts, moe_grouped_gemm=use_te, qk_layernorm=config.qk_layernorm)
        attention_modules = layer.submodules.self_attention.submodules
        attention_modules.core_attention = attention
        if not use_te:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            if config.qk_layernorm:
                attention_modules.q_layernorm = attention_modules.k_layernorm = RMSNorm
        layers.append(layer)
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm as Norm
    else:
        Norm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)

"""Table rows that families share. A family's TABLE is put together from these groups, and from rows of its own."""

from real_megatron.bridge.description import ModelDescription
from real_megatron.bridge.table import Rule
from real_megatron.bridge.transforms import Columns, GateUp, Qkv, Transform, Vocabulary, Whole

MEGATRON = "decoder.layers.{layer}."
HF = "model.layers.{layer}."


def hidden(d: ModelDescription) -> Transform:
    """A vector over the residual stream."""
    return Whole(d.hidden_size)


def head(d: ModelDescription) -> Transform:
    """A vector over one attention head."""
    return Whole(d.head_dim)


def vocabulary(d: ModelDescription) -> Transform:
    """A row per token of the vocabulary."""
    return Vocabulary(d.vocab_size, d.hidden_size)


def qkv(d: ModelDescription) -> Transform:
    """The weights of query, key and value."""
    return Qkv(d.num_heads, d.num_groups, d.head_dim, d.hidden_size)


def qkv_bias(d: ModelDescription) -> Transform:
    """The biases of query, key and value."""
    return Qkv(d.num_heads, d.num_groups, d.head_dim)


EMBEDDING = (Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),)

ATTENTION = (
    Rule(
        MEGATRON + "input_layernorm.weight",
        (HF + "input_layernorm.weight",),
        hidden,
        te_name=MEGATRON + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Rule(
        MEGATRON + "self_attention.linear_qkv.weight",
        (HF + "self_attn.q_proj.weight", HF + "self_attn.k_proj.weight", HF + "self_attn.v_proj.weight"),
        qkv,
    ),
    Rule(
        MEGATRON + "self_attention.linear_proj.weight",
        (HF + "self_attn.o_proj.weight",),
        lambda d: Columns(d.hidden_size, d.num_heads * d.head_dim),
    ),
)

QKV_BIAS = (
    Rule(
        MEGATRON + "self_attention.linear_qkv.bias",
        (HF + "self_attn.q_proj.bias", HF + "self_attn.k_proj.bias", HF + "self_attn.v_proj.bias"),
        qkv_bias,
    ),
)

QK_NORM = (
    Rule(MEGATRON + "self_attention.q_layernorm.weight", (HF + "self_attn.q_norm.weight",), head),
    Rule(MEGATRON + "self_attention.k_layernorm.weight", (HF + "self_attn.k_norm.weight",), head),
)

MLP = (
    Rule(
        MEGATRON + "pre_mlp_layernorm.weight",
        (HF + "post_attention_layernorm.weight",),
        hidden,
        te_name=MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        layers="dense",
    ),
    Rule(
        MEGATRON + "mlp.linear_fc1.weight",
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
        lambda d: GateUp(d.transformer_config["ffn_hidden_size"], d.hidden_size),
        layers="dense",
    ),
    Rule(
        MEGATRON + "mlp.linear_fc2.weight",
        (HF + "mlp.down_proj.weight",),
        lambda d: Columns(d.hidden_size, d.transformer_config["ffn_hidden_size"]),
        layers="dense",
    ),
)

OUTPUT = (
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), hidden),
    Rule("output_layer.weight", ("lm_head.weight",), vocabulary, when=lambda d: not d.tied),
)


def moe(gate: str, expert: str, projections: tuple[str, str, str]) -> tuple[Rule, ...]:
    """The rows of a mixture-of-experts layer.

    gate, expert: names of the router and of one expert below the layer; projections: of its gate, up and down part.
    """
    gate_proj, up_proj, down_proj = (f"{HF}{expert}.{name}.weight" for name in projections)
    return (
        Rule(
            MEGATRON + "pre_mlp_layernorm.weight",
            (HF + "post_attention_layernorm.weight",),
            hidden,
            layers="moe",
        ),
        Rule(
            MEGATRON + "mlp.router.weight",
            (f"{HF}{gate}.weight",),
            lambda d: Whole(d.num_experts, d.hidden_size),
            layers="moe",
        ),
        Rule(
            MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            (gate_proj, up_proj),
            lambda d: GateUp(d.transformer_config["moe_ffn_hidden_size"], d.hidden_size),
            te_name=MEGATRON + "mlp.experts.linear_fc1.weight{expert}",
            layers="moe",
        ),
        Rule(
            MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            (down_proj,),
            lambda d: Columns(d.hidden_size, d.transformer_config["moe_ffn_hidden_size"]),
            te_name=MEGATRON + "mlp.experts.linear_fc2.weight{expert}",
            layers="moe",
        ),
    )

"""The tensors that autograd saves for the backward pass of one micro-batch, on one rank: bytes by layer and tensor.

Each entry of a table is one tensor, saved by the operation that it is the input or the output of, as read in this
package, Megatron-Core, torch and Transformer Engine. Left out is what has one number a token (a norm's statistics,
indices of rows).

Of a micro-batch of T tokens a rank has

- between attention and MLP (residual stream, norms, inputs of their first projections) T / context tokens, with
  sequence parallelism T / (context · tensor), at full width: first projections gather them again in backward;
- inside attention and MLP T / context tokens, at 1 / tensor of the width;
- of keys and values under context parallelism those of all T tokens;
- of experts T · top-k / context rows on average, at full width before and 1 / tensor of the width inside an expert:
  expert-parallel ranks exchange rows, and tensor-parallel ones gather them.
"""

from dataclasses import dataclass

from real_megatron.bridge import padded_vocab
from real_megatron.planning.workload import Layout


@dataclass(frozen=True)
class Kernels:
    """Which implementations run: they save different tensors."""

    transformer_engine: bool
    """Its layer spec, whose norms save their input; those of policy/norm.py save a normalised copy as well."""
    fused_swiglu: bool
    """Megatron's fused activation, which saves its input alone."""
    flex_attention: bool
    """One kernel for all segments (policy/flex.py), else one call of scaled_dot_product_attention for each."""


CPU = Kernels(transformer_engine=False, fused_swiglu=False, flex_attention=False)
"""What runs without a GPU. Tests compare its numbers with what torch's hooks for saved tensors count."""
GPU = Kernels(transformer_engine=True, fused_swiglu=True, flex_attention=True)
"""With a GPU and Transformer Engine. Nothing has counted its tensors on a GPU: they are from reading, Transformer
Engine's in its public source. Tests count those of flex attention, uncompiled on the CPU. With `model.spec: local` on a
GPU it is `replace(GPU, transformer_engine=False)`."""


@dataclass(frozen=True)
class MicrobatchSize:
    """The size of a whole micro-batch, which context-parallel ranks run together."""

    tokens: int
    """With padding."""
    rows: int = 0
    """Rows that reach the output head."""
    joined_keys: int = 0
    """Without flex attention, on one rank: keys of all calls of attention that continue a prompt; each copies them."""
    masked_pairs: int = 0
    """Without flex attention, on one rank: queries times keys of all calls that take a mask."""


@dataclass(frozen=True)
class Shard:
    """What one rank has of a micro-batch and of the model's widths. Numbers of elements, unless stated otherwise."""

    layout: Layout
    microbatch: MicrobatchSize
    expert_load: float = 1.0
    """Rows of this rank's experts, relative to the mean of all ranks."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.layout.itemsize

    @property
    def tokens(self) -> float:
        """Inside attention and MLP."""
        return self.microbatch.tokens / self.layout.parallel.context

    @property
    def stream_tokens(self) -> float:
        """Between attention and MLP."""
        parallel = self.layout.parallel
        return self.tokens / parallel.tensor if parallel.sequence_parallel else self.tokens

    @property
    def stream(self) -> float:
        """Bytes of the residual stream."""
        return self.stream_tokens * self.hidden * self.itemsize

    @property
    def rows(self) -> float:
        """Rows of the output head, spread evenly over context-parallel ranks."""
        return self.microbatch.rows / self.layout.parallel.context

    @property
    def expert_rows(self) -> float:
        return self.tokens * self.layout.description.transformer_config["moe_router_topk"] * self.expert_load

    @property
    def hidden(self) -> int:
        return self.layout.description.hidden_size

    @property
    def heads(self) -> int:
        return self.layout.description.num_heads // self.layout.parallel.tensor

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return max(1, self.layout.description.num_groups // self.layout.parallel.tensor)

    def ffn(self, moe: bool) -> int:
        """Hidden width of an MLP, with `moe` of an expert."""
        width: int = self.layout.description.transformer_config["moe_ffn_hidden_size" if moe else "ffn_hidden_size"]
        return width // self.layout.parallel.tensor

    @property
    def vocabulary(self) -> int:
        """Columns of the output layer, with padding."""
        tensor = self.layout.parallel.tensor
        return padded_vocab(self.layout.description, tensor, self.layout.model.vocab_multiple) // tensor


def layer_bytes(shard: Shard, moe: bool, kernels: Kernels) -> dict[str, float]:
    """What a layer saves; with `moe` a mixture of experts.

    Where recomputation is `selective`, that is without what core attention saves. Where it is `full`, it is what the
    layer saves when it is run again.
    """
    return {**_attention(shard, kernels), **_attention_output(shard), **_second_half(shard, moe, kernels)}


def recomputed_attention(shard: Shard, moe: bool, kernels: Kernels) -> float:
    """How much more a layer has saved than before when its core attention has been recomputed (`selective`): what that
    saves, less what followed it in the layer, which is free by then. At least 0."""
    behind = {**_attention_output(shard), **_second_half(shard, moe, kernels)}
    return max(0.0, sum(_core_attention(shard, kernels).values()) - sum(behind.values()))


def head_bytes(shard: Shard, kernels: Kernels) -> dict[str, float]:
    """What the final norm and the output head save."""
    # The norm's output is gathered under sequence parallelism, and rows of it are selected: neither is saved.
    table = _norm("final norm", shard, shard.stream_tokens * shard.hidden, kernels)
    table["head rows"] = shard.rows * shard.hidden * shard.itemsize
    if shard.layout.model.head == "logits":
        # Overwritten with their gradient in backward.
        table["logits"] = shard.rows * shard.vocabulary * shard.itemsize
    else:
        table["maxima, sums and log-probs"] = 3 * shard.rows * 4
    return table


def saves_norm_input(shard: Shard, kernels: Kernels) -> bool:
    """Whether norms save their input itself: those of policy/norm.py save float32 copies of 16-bit inputs."""
    return kernels.transformer_engine or shard.itemsize == 4


def _norm(name: str, shard: Shard, elements: float, kernels: Kernels) -> dict[str, float]:
    """An RMSNorm. Its output is what the next operation saves."""
    if kernels.transformer_engine:
        return {f"{name} input": elements * shard.itemsize}
    # In float32: of 16-bit inputs, a copy.
    return {f"{name} input": elements * 4, f"{name} normalised": elements * shard.itemsize}


def _attention(shard: Shard, kernels: Kernels) -> dict[str, float]:
    """Norm, projection, norms of queries and keys, rotary embedding, core attention."""
    description, parallel = shard.layout.description, shard.layout.parallel
    tokens, itemsize = shard.tokens, shard.itemsize
    queries, keys = (tokens * heads * description.head_dim for heads in (shard.heads, shard.groups))
    selective = shard.layout.model.recompute == "selective"
    table = _norm("attention norm", shard, shard.stream_tokens * shard.hidden, kernels)
    table["projection input"] = shard.stream
    # Core attention's inputs. Under context parallelism it saves gathered keys and values instead of this rank's,
    # unless it is recomputed from them: from values that are a view, which keeps the projection's whole output.
    own = selective or parallel.context == 1
    whole = selective
    if description.transformer_config.get("qk_layernorm"):
        table |= _norm("query norm", shard, queries, kernels) | _norm("key norm", shard, keys, kernels)
        table["query and key norm statistics"] = tokens * (shard.heads + shard.groups) * 4
        if saves_norm_input(shard, kernels) and not kernels.transformer_engine:
            # Keys are a view as well; and so are queries, unless those of several key heads are put side by side.
            # Transformer Engine copies both.
            whole = True
            del table["key norm input"]
            if shard.groups == 1 or shard.groups == shard.heads:
                del table["query norm input"]
    if whole:
        # Where ranks outnumber key and value heads, Megatron gathers the output of all heads on every rank.
        heads = description.num_heads + 2 * description.num_groups
        ranks = parallel.tensor if description.num_groups >= parallel.tensor else 1
        table["queries, keys and values"] = tokens * heads / ranks * description.head_dim * itemsize
    # Each layer computes them, for queries and for keys.
    table["cosines and sines"] = 4 * tokens * description.rotary.dim * itemsize
    table["rotated queries"] = queries * itemsize
    if own:
        table["rotated keys"] = keys * itemsize
    if own and not selective:
        table["values"] = keys * itemsize
    return table if selective else table | _core_attention(shard, kernels)


def _core_attention(shard: Shard, kernels: Kernels) -> dict[str, float]:
    """What PackedAttention saves beside this rank's queries, keys and values."""
    size, head_dim = shard.microbatch, shard.layout.description.head_dim
    keys = shard.groups * head_dim
    table = {"log-sum-exp": shard.tokens * shard.heads * 4}
    if shard.layout.parallel.context > 1:
        table["keys and values of all ranks"] = 2 * size.tokens * keys * shard.itemsize
    if not kernels.flex_attention:
        # Before they are joined to one tensor, which flex attention's output is.
        table["outputs of segments"] = shard.tokens * shard.heads * head_dim * shard.itemsize
        table["keys and values behind the prompt's"] = 2 * size.joined_keys * keys * shard.itemsize
        table["masks"] = size.masked_pairs * shard.itemsize
    return table


def _attention_output(shard: Shard) -> dict[str, float]:
    """The input of attention's second projection."""
    return {"attention output": shard.tokens * shard.heads * shard.layout.description.head_dim * shard.itemsize}


def _second_half(shard: Shard, moe: bool, kernels: Kernels) -> dict[str, float]:
    """Norm, and MLP or mixture of experts."""
    table = _norm("MLP norm", shard, shard.stream_tokens * shard.hidden, kernels)
    if not moe:
        table["MLP input"] = shard.stream
        return table | _swiglu("MLP", shard.tokens * shard.ffn(moe) * shard.itemsize, kernels)
    config = shard.layout.description.transformer_config
    experts, topk, rows = config["num_moe_experts"], config["moe_router_topk"], shard.expert_rows
    table["router input"] = shard.stream
    # In float32 softmax, of all experts or of the chosen ones, and the probabilities of all; a map of one byte each;
    # the chosen experts and the order of rows as 64-bit indices.
    softmax = experts if config["moe_router_pre_softmax"] else topk
    table["router"] = shard.stream_tokens * (4 * softmax + 4 * experts + experts + 16 * topk)
    table["expert input"] = rows * shard.hidden * shard.itemsize
    table["expert probabilities"] = rows * 4
    half = rows * shard.ffn(moe) * shard.itemsize
    if not kernels.fused_swiglu:
        table["expert hidden without probability"] = half
    return table | _swiglu("expert", half, kernels)


def _swiglu(name: str, half: float, kernels: Kernels) -> dict[str, float]:
    """SwiGLU and the second projection's input. half: bytes of the gate, and of what it is multiplied by."""
    table = {f"{name} gate and up": 2 * half, f"{name} hidden": half}
    if not kernels.fused_swiglu:
        # The activated gate; and a copy of `up`, to which Megatron adds a constant.
        table[f"{name} factors"] = 2 * half
    return table

"""How much of the data-sheet rates real work reaches: the assumptions behind every projected second."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Efficiency:
    """Assumptions, one set for all models, GPUs and layouts. None has been measured with this package on a GPU.

    Fractions are of the rates in `hardware.Gpu`; times are in seconds. docs/scaling.md shows how far projections with
    these values are from published step times.
    """

    gemm: float = 0.65
    """Large bfloat16 matrix products: 600 to 700 of an H100's 989 TFLOP/s, whose clock its power limits."""
    gemm_rows: float = 128
    """Rows at which a matrix product reaches half of that: a thread block computes a tile of 128 × 256."""
    gemm_width: float = 256
    """Columns at which it does, as `gemm_rows`."""
    attention: float = 0.3
    """Attention: FlashAttention-2 reaches 35 % of an H100 (arXiv 2407.08608, abstract), FlexAttention, which this
    package uses, 85 to 90 % of that (PyTorch's blog post that introduced it)."""
    memory: float = 0.8
    """Memory-bound kernels: norms, SwiGLU, optimizer. Streaming kernels reach 80 to 90 % of the data sheet."""
    nvlink: float = 0.75
    """Collectives within a node: NCCL's rings reach about three quarters of NVLink's rate on large messages."""
    network: float = 0.7
    """Collectives between nodes: large messages reach 90 % on an idle fabric; other groups of the job share it."""
    nvlink_latency: float = 20e-6
    """Of one collective within a node, launch included."""
    network_latency: float = 50e-6
    """Of one collective or message between nodes, launch included."""
    launch: float = 0.4e-3
    """Host time of one dense layer's forward pass, some 50 kernels of 8 μs. It hides behind the GPU's own time."""
    moe_launch: float = 2e-3
    """Host-bound time of the forward pass of one layer with experts: routing, sorting tokens, the synchronisation that
    tells the host how many each expert has. It does not hide. Megatron-Bridge's performance summary (25.11) has
    Qwen3-30B-A3B at 5,275 tokens/s on each of 16 H100s: 32 ms a layer and micro-batch of 8,192 tokens, forward and
    backward, of which matrix products and exchanges explain about half. The rest is 5 ms a forward pass for 8,192
    tokens; some of it depends on tokens, so that less is assumed for the smaller micro-batches of this package."""
    expert_imbalance: float = 1.3
    """Work of the busiest expert-parallel rank over the mean: post-training does not force tokens to be spread."""
    imbalance: float = 1.05
    """Work of the busiest data-parallel rank over the mean, from lengths that differ; `imbalance` in a run's metrics.
    Rounding up comes on top."""
    gradient_overlap: float = 0.8
    """Share of the last micro-batch's backward pass behind which gradients are reduced: the last bucket has none."""
    message_overlap: float = 0.8
    """Share of messages between pipeline stages that the interleaved schedule hides; the plain one hides none."""
    decode_memory: float = 0.75
    """Decoding: weights and KV cache are read by many small kernels."""
    decode_gemm: float = 0.5
    """Decoding and prefill: matrix products of a server, with attention and scheduling between them."""
    decode_step: float = 4e-3
    """Fixed time of one decoding step of a server: scheduling, sampling, log-probs, kernels behind each other."""
    decode_sequence: float = 10e-6
    """Host time per sequence and decoding step: the new token, its log-prob, the check for its end."""
    reduce_latency: float = 12e-6
    """All-reduce of a decoding step's few rows over NVLink, by a kernel of the server's own."""
    server_memory: float = 0.85
    """Share of a GPU that a server takes for weights and KV cache (`mem_fraction_static` of SGLang)."""
    host_copy: float = 50e9
    """Bytes/s from a GPU to pinned host memory, where a sync keeps the weights (rollout.keep_weights): 52.8 GB/s from
    each H100 over PCIe 5 (NVIDIA/nvbandwidth issue 24); an A100's PCIe 4 has half of it (issue 53: 25 GB/s). The first
    sync of a run, which pins the memory, takes longer."""
    tensor: float = 0.3e-3
    """Time per Hugging Face tensor of a sync: slicing and copying here, finding and filling the weight in the server.
    slime's 7 s for the 18,867 tensors of Qwen3-30B-A3B, colocated, are 0.37 ms each with all else; verl's 25 s
    (verl-project/verl issue 7060), which it calls dominated by them, are 1.3 ms each."""
    bucket: float = 0.02
    """Time per bucket of a sync: one request to every server, and its answer."""
    pause: float = 0.5
    """Of a sync: stopping the servers, flushing their caches, going on."""
    wake: float = 2.0
    """Of colocated servers a step: giving memory back and taking it again."""
    response: float = 1.5e-3
    """Host time per response of 600 tokens that the GPUs wait for, on rank 0. Measured on one core that other processes
    used too: finding the score 0.89 ms, reading the reply with its log-probs 0.37, its request 0.13 (8 responses each),
    counting n-grams 0.12, planning and packing 0.03."""


DEFAULT = Efficiency()

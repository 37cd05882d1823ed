"""Typed run configuration: YAML files, `a.b=c` overrides, strict keys.

Every section is one pydantic model; every field's description becomes a line of docs/configuration.md:
`python -m real_megatron.config > docs/configuration.md`.
"""

import io
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from real_megatron.sections import Section, describe_keys

# Choices that code elsewhere takes as arguments: their values are listed here alone.
Probabilities = Literal["full", "renormalized"]
Baseline = Literal["rloo", "group_mean", "none"]
Ratio = Literal["none", "ppo", "truncated_is"]
RatioLevel = Literal["sequence", "token"]
AspectAdvantages = Literal["together", "separate"]
NoAnchorRule = Literal["penalize", "force", "drop"]
JudgedNoAnchorRule = Literal["force", "drop"]
LongPromptsRule = Literal["drop", "cut_left"]

# Arguments of transformers' apply_chat_template and of what it calls; `data/encode.py` sets those that it needs.
RESERVED_TEMPLATE_ARGS = frozenset(
    "conversation conversations messages tools documents chat_template add_generation_prompt continue_final_message "
    "tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs".split()
)

# Arguments of local servers by which their requests would miss them.
_OWN_ARGUMENTS = {
    "--port": "local servers listen where rollout.port says",
    "--api-key": "local servers get an API key of the run's own, which no file holds",
    "--admin-api-key": "local servers get an API key of the run's own, which no file holds",
}

SUPERVISED = ("raft", "tract", "sft")
"""Values of `objective.name` that train on given responses; the others sample them."""


class ModelConfig(Section):
    """The model that is trained."""

    path: str = Field(
        "", description="Hugging Face checkpoint to start from: a directory, or a name on the hub (`owner/name`)."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a checkpoint on the hub; unset: its main branch."
    )
    family: str = Field(
        "auto",
        description="Model family: by config.json's model_type, or module:name for one of your own "
        "(docs/extending.md).",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Parameter and GEMM dtype; auto: bfloat16 with a GPU, float32 without."
    )
    spec: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="Megatron layer spec; auto: Transformer Engine where it and a GPU exist, else local."
    )
    megatron_class: Literal["GPTModel", "HybridModel"] = Field(
        "GPTModel",
        description="Megatron-Core's model class. HybridModel succeeds GPTModel and needs Megatron-Core 0.19; names, "
        "numbers and checkpoints are the same (docs/hybrid_model.md).",
    )
    vocab_multiple: int = Field(
        64,
        ge=1,
        le=65_536,
        description="The vocabulary is padded to a multiple of this number times the tensor-parallel size.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Megatron activation recomputation: full, of whole layers; selective, of core attention, which "
        "takes less memory on a CPU only (flex_attention saves little, and its inputs more).",
    )
    recompute_layers: int = Field(1, ge=1, description="Layers per recomputed block when recompute is full.")
    head: Literal["auto", "logits", "linear"] = Field(
        "auto", description="Form of the output head: stored logits, or fused with the LM-head GEMM; auto: linear."
    )
    head_memory_mib: int = Field(256, ge=1, description="Byte budget of the linear head's chunks, in MiB.")
    fp32_logits: bool = Field(
        True,
        description="Keep logits in float32 when GEMM inputs are bfloat16; rounded ones are noise in the reward, in "
        "scores and between engine and policy. Holds for the linear head, the transformers engine and the servers that "
        "are started here; attached ones need their own switch (docs/mathematics.md). Stored logits (head: logits) "
        "always have the model's dtype.",
    )


class ParallelConfig(Section):
    """How the model is spread over ranks. Data parallelism takes the ranks that are left."""

    tensor: int = Field(1, ge=1, description="Tensor-parallel size (TP).")
    pipeline: int = Field(1, ge=1, description="Pipeline-parallel size (PP).")
    virtual_pipeline: int | None = Field(
        None, ge=2, description="Model chunks per pipeline rank (interleaved schedule)."
    )
    account_for_embedding: bool = Field(
        False,
        description="The embedding counts as a layer where layers are dealt out to pipeline stages: the first stage "
        "has one fewer.",
    )
    account_for_loss: bool = Field(
        False, description="So does the output layer: the last stage has one layer fewer. 94 layers then divide by 8."
    )
    context: int = Field(
        1,
        ge=1,
        description="Context-parallel size (CP): ranks that share the tokens of each micro-batch, so that "
        "batch.max_tokens can grow with it.",
    )
    expert: int = Field(1, ge=1, description="Expert-parallel size (EP) of mixture-of-experts models.")
    timeout_minutes: int = Field(
        120, ge=1, le=525_600, description="Longest wait of ranks for each other, after which a run that hangs ends."
    )
    stuck_minutes: float = Field(
        60,
        ge=0,
        description="A run without any progress for so long writes the stacks of all ranks (docs/reading_a_run.md) and "
        "ends, so that a launcher starts it again; keep it below timeout_minutes; 0: never.",
    )
    sequence_parallel: bool = Field(False, description="Shard activations over TP ranks between layers (SP).")
    distributed_optimizer: bool = Field(
        True, description="Shard optimizer state over data-parallel ranks. Stays as it is when a run is resumed."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel shards over tensor-parallel ranks: set tensor above 1 or switch it off")
        if self.virtual_pipeline and self.pipeline == 1:
            raise ValueError("virtual_pipeline splits pipeline ranks: set pipeline above 1 or leave it unset")
        if self.pipeline == 1 and (self.account_for_embedding or self.account_for_loss):
            raise ValueError(
                "account_for_embedding and account_for_loss say how layers are dealt out to pipeline stages: set "
                "pipeline above 1 or switch them off"
            )
        return self


class OptimizerConfig(Section):
    """Megatron's Adam with warm-up and decay."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    warmup_steps: int = Field(0, ge=0, description="Updates of linear warm-up; the first trains at lr / warmup_steps.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape of the decay.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first-moment decay.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second-moment decay.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    clip_grad: float = Field(1.0, ge=0, description="Gradient norm limit; 0 switches clipping off.")
    max_skipped: int = Field(
        3,
        ge=0,
        description="Updates in a row that are skipped because their loss or gradient is not finite (or a spike), "
        "before the run ends; 0: the first one ends it.",
    )
    spike_factor: float = Field(
        0.0,
        ge=0,
        description="Also skip an update whose gradient norm is more than this many times the median of the last 50; "
        "0: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}: the decay ends at min_lr, lower it")
        if 0 < self.spike_factor <= 1:
            raise ValueError(
                f"spike_factor {self.spike_factor:g} would skip ordinary updates: set it well above 1, or to 0 for none"
            )
        return self


class BatchConfig(Section):
    """Size and packing of a step's batch."""

    prompts: int = Field(256, ge=1, le=1_000_000, description="Prompts per step (global). For SFT: examples per step.")
    max_tokens: int = Field(16384, ge=1, description="Token budget of a micro-batch.")
    mini_batches: int = Field(
        1,
        ge=1,
        description="Mini-batches per rollout batch, with one optimizer update each; more than 1 needs an importance "
        "ratio.",
    )
    old_logprobs: Literal["engine", "policy"] = Field(
        "engine",
        description="Sampling log-probs of the importance ratio: the rollout engine's, or recomputed by the policy "
        "before the first update.",
    )
    share_prompt: bool = Field(
        True,
        description="The responses of a group share one copy of their prompt, and of what they begin with alike; the "
        "branches of a score share their response. False: nothing is shared, for comparison.",
    )


class AspectConfig(Section):
    """One aspect of a rubric. What is not given is as in `scale`."""

    anchor: str = Field(
        "", description="Text before the aspect's score, behind scale.anchor; empty: its name and `: `."
    )
    scores: list[str] | None = Field(None, description="Score texts, as scale.scores.")
    values: list[float] | None = Field(None, description="Numeric value of each score, as scale.values.")
    spellings: dict[str, list[str]] | None = Field(None, description="Further texts of a score, as scale.spellings.")
    weight: float = Field(1.0, gt=0, description="Weight of the aspect's reward, and in the overall score.")

    @field_validator("scores", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        return _range(value) if isinstance(value, str) else value


class ScaleConfig(Section):
    """The score scale and how its texts are found in a response."""

    scores: list[str] = Field(
        ["1", "2", "3", "4", "5"],
        description="Score texts, lowest first: a list, or numbers such as `0..100` or `1..5 by 0.5`. Each "
        "may be several tokens.",
    )
    values: list[float] | None = Field(
        None, description="Numeric value of each score; default: the number itself, or 1, 2, … for letters."
    )
    anchor: str = Field("[RESULT] ", min_length=1, description="Text that precedes the score in a response.")
    spellings: dict[str, list[str]] = Field(
        default_factory=dict,
        description='Further texts of a score, as `score: [texts]`, such as `"5": ["5.0", five]`: their probabilities '
        "are added to the score's.",
    )
    ends: list[str] = Field(
        default_factory=list,
        description="For a score that is the beginning of another, as 1 of 10: texts one of which must follow it, such "
        "as a closing tag; `eos` is the end of sequence. Empty: whatever does not go on to another score ends it.",
    )
    aspects: dict[str, AspectConfig] = Field(
        default_factory=dict,
        description="Several scores of a response, as `aspect: {anchor: ..., scores: ..., weight: ...}`; "
        "`aspect: {}` takes scores, values and spellings from here. Labels are then a list or a mapping.",
    )
    probabilities: Probabilities = Field(
        "full",
        description="Expected score over the whole vocabulary's probabilities, or renormalised over the score tokens; "
        "in training, evaluation and judging alike.",
    )

    @field_validator("scores", mode="before")
    @classmethod
    def _written_out(cls, value: Any) -> Any:
        return _range(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.scores) < 2 or len(set(self.scores)) < len(self.scores):
            raise ValueError(f"scores must be two or more different texts, not {self.scores}")
        if self.values is not None and len(self.values) != len(self.scores):
            raise ValueError(f"values has {len(self.values)} numbers for {len(self.scores)} scores: give one a score")
        for name in self.aspects:
            if not re.fullmatch(r"\w[\w-]{0,49}", name):
                raise ValueError(f"aspects: {name!r} names metrics and files: use letters, digits, `_` and `-`")
        if len(self.aspects) == 1:
            raise ValueError("aspects has one aspect: give two or more, or one scale in scores")
        return self


_RANGE = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*\.\.\s*(-?\d+(?:\.\d+)?)(?:\s+by\s+(\d+(?:\.\d+)?))?\s*")
LARGEST_SCALE = 1001


def _range(text: str) -> list[str]:
    """The numbers of `LOW..HIGH` or `LOW..HIGH by STEP` as they are written by hand: 1, 1.5, 2."""
    found = _RANGE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is no list and no range: write [poor, fair, good], 0..100, or 1..5 by 0.5")
    low, high, step = (Decimal(number or 1) for number in found.groups())
    if not step or high <= low or (high - low) % step:
        raise ValueError(f"{text!r}: {high} must be above {low} by a multiple of the step {step}")
    count = int((high - low) / step) + 1
    if count > LARGEST_SCALE:
        raise ValueError(f"{text!r} has {count} scores; at most {LARGEST_SCALE} are possible")
    numbers = (low + step * k for k in range(count))
    return [f"{number:f}".rstrip("0").rstrip(".") if "." in f"{number:f}" else f"{number:f}" for number in numbers]


_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "rloo": {"reward": "binary"},
    "grpo": {"reward": "binary", "baseline": "group_mean", "std_normalize": True, "ratio": "ppo"},
    "jepo": {"reward": "answer_logprob"},
    "raft": {"score_nll": False},
    "tract": {"score_nll": False},
}


class ObjectiveConfig(Section):
    """What is optimised (docs/mathematics.md).

    `name` also chooses the defaults of the other fields: grpo, rloo and jepo are the same code as real with another
    reward and advantage. Fields that are given win over the name's defaults; a run's saved `config.yaml` gives all of
    them. rloo and grpo sample the score as one more token, an action like any other, and reward it with 0 or 1; with
    reward binary_expected rloo has the sampled score integrated out. grpo is GRPO's normalised advantage and clipping
    without its division by the response's length and, unless `kl` is set, without its KL term; jepo is the
    single-sample bound.
    """

    name: Literal["real", "rloo", "grpo", "jepo", "raft", "tract", "sft"] = Field("real", description="Objective.")
    reward: str = Field(
        "real",
        description="Reward: real; binary (default of rloo and grpo), 1 if the sampled score is the label's, else 0; "
        "binary_expected, its mean π(y*), without sampling the score; binary_greedy, 1 if the most probable score is "
        "the label's; answer_logprob (default of jepo); or module:name for one of your own (docs/extending.md).",
    )
    beta: float = Field(1.0, ge=0, description="β, weight of Term 2; 1 is the exact gradient.")
    lam: float = Field(
        1.0, ge=0, description="λ, weight of log π(y*) in the reward; raft, tract: weight of the next-token loss."
    )
    score_nll: bool = Field(
        True,
        description="sft, raft, tract: the score token counts in the next-token loss; default of raft and tract: "
        "false, it has the squared error alone.",
    )
    term1: bool = Field(True, description="Include Term 1 (policy gradient on the CoT).")
    baseline: Baseline = Field("rloo", description="Baseline of the advantage; default of grpo: group_mean.")
    std_normalize: bool = Field(
        False,
        description="Divide advantages by the group's standard deviation; default of grpo: true. A reward that has a "
        "Term 2 also needs beta 0.",
    )
    aspect_advantages: AspectAdvantages = Field(
        "together",
        description="With scale.aspects: advantages of the weighted mean of their rewards, or the weighted mean of the "
        "advantages of each, normalised and clamped by itself (differs with std_normalize or clamp).",
    )
    clamp: float | None = Field(None, gt=0, description="Clamp advantages to [-clamp, clamp].")
    token_mean: bool = Field(
        False, description="Average Term 1 over the batch's tokens instead of summing within a response."
    )
    kl: float = Field(0.0, ge=0, description="Weight of the KL term to the reference policy.")
    ratio: Ratio = Field(
        "none",
        description="Importance ratio to the sampling policy: none, PPO clipping (default of grpo), truncated weights.",
    )
    clip: float = Field(0.2, gt=0, description="PPO clip range ε.")
    is_cap: float = Field(2.0, gt=0, description="Cap of truncated importance weights.")
    is_level: RatioLevel = Field(
        "token",
        description="Truncated weights of tokens (little variance, biased by what the other tokens' ratios say) or of "
        "whole responses (unbiased below the cap, for short responses: docs/mathematics.md).",
    )
    no_anchor: NoAnchorRule = Field(
        "penalize",
        description="Response without an anchor: lowest reward of its group and no Term 2; anchor appended "
        "(better where the length limit cuts off many); dropped.",
    )
    no_anchor_reward: float | None = Field(
        None,
        description="Reward of a response without an anchor under penalize; unset: for real and answer_logprob less "
        "than the worst answer of its group by a margin (docs/mathematics.md), for the binary rewards 0.",
    )

    @model_validator(mode="after")
    def _defaults_of_name(self) -> Self:
        own = _OBJECTIVE_DEFAULTS.get(self.name, {})
        for key in {key for defaults in _OBJECTIVE_DEFAULTS.values() for key in defaults} - self.model_fields_set:
            # Not an assignment: the field does not count as set, so that it follows a later change of the name.
            self.__dict__[key] = own.get(key, type(self).model_fields[key].default)
        return self

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not self.term1 and not self.beta:
            raise ValueError("term1 is off and beta is 0: nothing would be learnt; switch one of them on")
        if self.name == "sft" and not self.score_nll:
            raise ValueError("score_nll is off: sft has no other loss on the score; switch it on, or set name to raft")
        return self


class RolloutConfig(Section):
    """Generation of responses."""

    engine: str = Field(
        "transformers",
        description="Rollout engine: transformers (embedded in the trainer), sglang or vllm (servers), or module:name "
        "for one of your own (docs/extending.md).",
    )
    n: int = Field(8, ge=1, le=10_000, description="Responses per prompt (K).")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature T. `train` optimises the policy at T: log-probs of sampled tokens are those "
        "of logits / T on both sides of every ratio; the score distribution stays at temperature 1.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling mass of `critiques`. `train` takes 1 only: no weight corrects for responses that "
        "are never drawn.",
    )
    batch_size: int = Field(256, ge=1, description="Sequences generated at once by the embedded engine.")
    staleness: Literal[0, 1] = Field(
        0, description="1: the next batch is generated while this one trains, from weights one step old."
    )
    servers: list[str] = Field(
        default_factory=list, description="URLs of running servers to attach to; empty: start local ones."
    )
    router: str | None = Field(
        None, description="URL of a router in front of `servers` that takes the generation requests."
    )
    api_key_variable: str = Field(
        "",
        description="Name of the environment variable that holds the API key of `servers` (and of the router); empty: "
        "they have none. Local servers get a random one for each run.",
    )
    replicas: int = Field(1, ge=1, description="Local servers to start.")
    tensor: int = Field(1, ge=1, description="GPUs per local server (its tensor-parallel size).")
    first_gpu: int = Field(0, ge=0, description="Index of the first GPU that local servers use.")
    python: str = Field("", description="Python of the environment that has the server installed; empty: this one.")
    server_args: list[str] = Field(default_factory=list, description="Further arguments of local servers.")
    port: int = Field(0, ge=0, le=65535, description="First port of local servers; 0: free ones.")
    start_timeout_s: float = Field(900, gt=0, description="Longest wait for a server to become healthy.")
    restarts: int = Field(3, ge=0, description="Restarts of a local server in a row before giving it up.")
    concurrency: int = Field(64, ge=1, description="Requests in flight per server (a request: all K of a prompt).")
    timeout_s: float = Field(600, gt=0, description="Deadline of one request.")
    attempts: int = Field(4, ge=1, description="Attempts per request on connection loss, timeout, 5xx or a bad reply.")
    weight_sync: Literal["auto", "distributed", "tensor", "disk"] = Field(
        "auto",
        description="How weights reach servers: broadcast in a process group, shared memory (the trainer's GPU must be "
        "visible to the server), or files; auto: tensor when colocated, else distributed.",
    )
    sync_host: str = Field("127.0.0.1", description="Address of this host that servers reach, for distributed sync.")
    sync_timeout_s: float = Field(
        600,
        gt=0,
        description="Deadline for a server to load a whole checkpoint; each smaller step of a sync has 120 s at most.",
    )
    bucket_mib: int = Field(512, ge=1, description="Weights are sent in buckets of this size, in MiB.")
    keep_weights: bool = Field(
        True, description="Keep the last weights in host memory, to bring a restarted server up to date in mid-step."
    )
    colocate: bool = Field(False, description="Servers share the trainer's GPUs and release memory while it trains.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.colocate and self.staleness:
            raise ValueError(
                "colocate: servers sleep while the policy trains; staleness 1: they generate meanwhile; switch one of "
                "them off"
            )
        for key, urls in (("servers", self.servers), ("router", [self.router] if self.router is not None else [])):
            for url in urls:
                if not _is_url(url):
                    raise ValueError(f"{key}: {url!r} is no URL of a server: write it as http://HOST:PORT")
            if len({url.rstrip("/") for url in urls}) < len(urls):
                raise ValueError(f"{key} names a server twice: name each once")
        if self.api_key_variable and not self.servers:
            raise ValueError(
                "api_key_variable names the API key of servers, which are empty: local servers get a key of the run's "
                "own; leave it empty, or name the servers"
            )
        if self.port + self.replicas - 1 > 65535:
            raise ValueError(f"port: {self.replicas} ports from {self.port} on go beyond 65535: lower it")
        for argument in self.server_args:
            option = argument.partition("=")[0].replace("_", "-")
            if option in _OWN_ARGUMENTS:
                raise ValueError(f"server_args: {option}: {_OWN_ARGUMENTS[option]}; remove it")
        return self


class DataSource(Section):
    """One data set."""

    format: str = Field(
        "jsonl",
        description="Record format: jsonl, feedback_collection, feedback_bench, flask, vicuna_bench, mt_bench, or "
        "module:name for one of your own (docs/extending.md).",
    )
    path: str = Field(
        ...,
        description="Local file (.jsonl, .json, .parquet, .csv, .tsv), or the data set's name on the hub.",
    )
    subset: str | None = Field(None, description="Subset of a hub data set that has several.")
    split: str = Field("train", description="Split, for hub data sets.")
    limit: int | None = Field(None, ge=1, description="Use the first N records only.")
    score: str | None = Field(
        None,
        min_length=1,
        description="Column of the annotations whose mean is the label, such as human_score of FLASK; unset: the "
        "format's own (jsonl: label; feedback_collection, feedback_bench: orig_score; the others: gpt4_score).",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Columns under our names, as `our name: their column`: what the format reads (for jsonl: prompt, "
        "messages, label, cot, id, group), or what a template names (docs/extending.md).",
    )
    labels: dict[str, float] = Field(
        default_factory=dict,
        description="Numbers of labels that are words or class numbers, in the label's column (see score), as "
        "`text: number`; texts such as yes, no, true and false need quotes. When set, any other label is an error.",
    )
    score_statement: Literal["cut", "keep"] = Field(
        "cut",
        description="What becomes of a critique's own score statement at its end (So the overall score is 4.): "
        "it is cut off (counted), and supervised training refuses critiques whose first or last sentences say the "
        "label; or it is kept, and nothing is checked.",
    )
    critique_end: str | None = Field(
        None, description="Regular expression: a critique ends where it first matches, beside score_statement."
    )

    @field_validator("critique_end")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            empty = value is not None and re.search(value, "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        if empty:
            raise ValueError(f"{value!r} matches the empty text, so that no critique would be left: make it longer")
        return value


class EvaluationSource(DataSource):
    """One evaluation data set: a data set (`data.train[i]`), and how its rows belong together."""

    cluster: str | None = Field(
        None,
        description="Column whose rows of one value are resampled together for the confidence intervals, such as the "
        "question of several answers; unset: `group` where a row has it, else each row by itself.",
    )
    within: str | None = Field(
        None,
        description="Column within whose values correlation is computed too, and averaged over them, such as the "
        "aspect or the document.",
    )


class DataConfig(Section):
    """Training and evaluation data."""

    train: list[DataSource] = Field(default_factory=list, description="Training data sets.")
    eval: dict[str, EvaluationSource] = Field(default_factory=dict, description="Named evaluation data sets.")
    template: str = Field(
        "plain",
        description="Prompt template: a built-in name (plain, prometheus) or a file. Control tokens in it, as in data, "
        "are ordinary text: they come from the chat template alone.",
    )
    chat_template: bool = Field(True, description="Write prompts with the tokenizer's chat template, if it has one.")
    chat_template_args: dict[str, bool | int | float | str] = Field(
        default_factory=dict,
        description="Variables for the chat template, such as `{enable_thinking: false}` for Qwen3.",
    )
    max_prompt_tokens: int = Field(
        2048, ge=1, description="Longest prompt, in training, evaluation and judging; see long_prompts."
    )
    long_prompts: LongPromptsRule = Field(
        "drop",
        description="Longer prompts are dropped, or lose their beginning (but for a begin-of-sequence token); they are "
        "counted. `judge` reports rows that it drops.",
    )
    max_response_tokens: int = Field(
        1024,
        ge=1,
        description="Longest response: generation stops there, and longer supervised ones are dropped and counted.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        bad = [name for name in self.eval if not re.fullmatch(r"\w[\w.-]{0,99}", name)]
        if bad:
            raise ValueError(
                f"eval: {bad[0]!r} names files of results: use letters, digits, `_`, `-` and `.`, 100 of them at "
                "most, and begin with one of the first three"
            )
        reserved = sorted(RESERVED_TEMPLATE_ARGS & self.chat_template_args.keys())
        if reserved:
            raise ValueError(
                f"chat_template_args: {reserved[0]!r} is an argument of apply_chat_template and set already: remove it "
                "and give variables of the template only"
            )
        return self


class SftConfig(Section):
    """Supervised fine-tuning: where the CoTs come from."""

    cots: Literal["given", "none"] = Field(
        "given",
        description="Critiques of the data set (TRACT's second stage: a file that `real-megatron critiques` wrote), or "
        "none: the response is anchor and score alone, a judge that answers directly.",
    )


class CheckpointConfig(Section):
    """Checkpoints (Megatron torch_dist) and export."""

    every: int = Field(100, ge=0, description="Save every N steps, and at the end; 0: at the end only.")
    keep: int = Field(2, ge=1, description="Checkpoints kept, of the newest.")
    asynchronous: bool = Field(
        False,
        description="Write the files while training goes on (docs/surviving.md): a step waits for copies in the memory "
        "of the host, not for the disk. The last checkpoint, and one at a signal, are waited for.",
    )
    best: str = Field(
        "",
        description="Keep the best checkpoint, too, by this metric of the evaluations, such as dev/rail/pearson: "
        "every evaluation then has a checkpoint, and checkpoints/best.json names the best; empty: none.",
    )
    resume: bool = Field(True, description="Continue from the newest complete checkpoint in the output directory.")
    save_hf: bool = Field(True, description="Write a Hugging Face checkpoint at the end.")


class MetricsConfig(Section):
    """Where metrics go. metrics.jsonl is always written."""

    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    wandb_project: str | None = Field(None, description="wandb project; unset: wandb is not used.")
    print_every: int = Field(1, ge=0, description="Print a line every N steps; 0: the last step only.")
    samples_every: int = Field(
        10,
        ge=0,
        description="Every N steps of `train`, write some responses with their scores and rewards to samples.jsonl, "
        "TensorBoard and wandb, after a forward pass over them; 0: never.",
    )


class EvaluationConfig(Section):
    """Evaluation during and after training."""

    every: int = Field(0, ge=0, description="Evaluate every N steps and before the first; 0: at the end only.")
    samples: int = Field(1, ge=1, description="CoTs per example.")
    temperature: float = Field(1.0, ge=0, description="Sampling temperature of evaluation CoTs; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling mass of evaluation CoTs.")
    batch_size: int = Field(256, ge=1, description="Examples judged at a time, here and by `judge`.")
    bootstrap: int = Field(1000, ge=1, description="Bootstrap resamples for the confidence intervals.")
    no_anchor: JudgedNoAnchorRule = Field(
        "force", description="CoT without an anchor: it gets one appended, or is left out (and counted)."
    )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in text
    except ValueError:  # a port that is none, half an IPv6 address
        return False


class RunConfig(Section):
    """A whole run."""

    seed: int = Field(0, ge=0, description="Seed of data order and sampling.")
    output: Path = Field(Path("runs/default"), description="Directory for metrics, checkpoints and reports.")
    steps: int = Field(100, ge=1, description="Training steps: rollout batches, or batches of SFT examples.")
    epochs: float | None = Field(
        None, gt=0, le=1_000_000, description="Passes over the training data; when set, it replaces steps."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="Model.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Parallelism.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="Batch.")
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="Score scale.")
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="Objective.")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="Rollout.")
    sft: SftConfig = Field(default_factory=SftConfig, description="Supervised fine-tuning.")
    data: DataConfig = Field(default_factory=DataConfig, description="Data.")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="Evaluation.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    metrics: MetricsConfig = Field(default_factory=MetricsConfig, description="Metrics.")

    @field_validator("output", mode="before")
    @classmethod
    def _names_a_directory(cls, value: Any) -> Any:
        text = str(value)
        if isinstance(value, str) and not text:
            raise ValueError("is empty: name a directory")
        if re.match(r"~[\w-]*(/|$)", text) or re.search(r"\$(\w|\{)", text):
            raise ValueError(f"{text}: `~` and variables are not replaced in a configuration: write the directory out")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_rl:
            if self.batch.mini_batches > self.batch.prompts:
                raise ValueError(
                    f"batch.mini_batches is {self.batch.mini_batches} for batch.prompts {self.batch.prompts}: an "
                    "update needs at least one prompt"
                )
            return self
        if self.batch.mini_batches > 1:
            raise ValueError(
                f"batch.mini_batches is {self.batch.mini_batches}: {self.objective.name} has no rollouts to "
                "reuse, set it to 1"
            )
        if self.objective.kl > 0:
            raise ValueError(f"objective.kl: {self.objective.name} has no KL term, set it to 0")
        return self

    @property
    def is_rl(self) -> bool:
        """Whether the objective trains on sampled responses (real, rloo, grpo, jepo)."""
        return self.objective.name not in SUPERVISED


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # it becomes a file
    print(describe_keys(RunConfig), end="")

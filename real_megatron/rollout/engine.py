"""The protocol that every rollout engine fulfils, its errors, and how engines are found. Knows neither Megatron nor
training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from real_megatron.config import RolloutConfig
from real_megatron.errors import DataError, EngineError, PromptRefused
from real_megatron.hf.side_files import read_config
from real_megatron.hf.stop_ids import stop_ids
from real_megatron.registry import Registry, calling_module
from real_megatron.scores import Branch


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled."""

    n: int = 1
    """Responses per prompt (K)."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    """Texts after which generation stops; the token that completes the text is kept in the response."""
    watch_ids: tuple[int, ...] = ()
    """Tokens whose log-probability is recorded at every position (the score tokens: RAIL without a second pass)."""


@dataclass
class Response:
    """One sampled response."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural log-probability of each sampled token under log_softmax(logits / T), before top-p."""
    finish_reason: str
    """`stop` (a stop text was produced), `eos` (an end-of-sequence token is the last token) or `length`."""
    weight_version: int
    """The oldest weights that contributed a token."""
    watched: list[list[float]] | None = None
    """Per position the log-probabilities of `watch_ids`, under the same distribution as `logprobs`; None unasked."""


class RolloutEngine(Protocol):
    """Generates responses and follows the policy's weights.

    All methods are synchronous for the caller; an engine may be concurrent inside.
    """

    def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams, seeds: Sequence[int] | None = None
    ) -> list[list[Response]]:
        """Sample `params.n` responses for each prompt (token ids in, token ids out).

        `seeds` holds one seed per prompt; engines that can reproduce sampling make the result depend on the prompt,
        its seed and the weights alone, not on which other prompts are in the call.

        Raises PromptRefused for a prompt that the engine cannot take (its message does not repeat the index),
        EngineError when it fails.
        """
        ...

    def branch_logprobs(self, sequences: Sequence[list[int]], branches: Sequence[Branch]) -> Tensor:
        """Log-probabilities (T = 1, whole vocabulary) of each branch's tokens `ids` behind a sequence and the branch's
        path.

        Returns fp32 `[len(sequences), ids of all branches]` on CPU, one branch's after the other's. This is RAIL's
        score distribution: that of single tokens is one branch without a path. Errors as of `generate`; PromptRefused
        counts in `sequences`.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights by a stream of (Hugging Face name, full tensor), then drop every cached state.

        A sleeping engine takes back the memory of its weights for it; `wake` then gives it the rest.
        """
        ...

    def sleep(self) -> None:
        """Release device memory until `wake`."""
        ...

    def wake(self) -> None: ...

    def health(self) -> None:
        """Raise EngineError, saying what is wrong, when the engine cannot serve."""
        ...

    def close(self) -> None: ...


class BadResponse(EngineError):
    """An engine's responses to a prompt that are not what was asked for. `index` is the prompt's place in the call.

    returned: what the engine has returned; more: what the message says behind the prompt's number
    """

    def __init__(self, index: int, returned: str, more: str = "") -> None:
        super().__init__(f"the rollout engine returned {returned} for prompt {index}{more}")
        self.index = index
        self._said = returned, more

    def at(self, index: int) -> "BadResponse":
        """The same of the prompt at another place: that in the call which this one was a part of."""
        return BadResponse(index, *self._said)

    def __reduce__(self) -> tuple[type["BadResponse"], tuple[int, str, str]]:
        return type(self), (self.index, *self._said)


class WeightSyncError(EngineError):
    """No server holds the new weights. Nothing is served until `update_weights` is called again and succeeds."""


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is built from."""

    config: RolloutConfig
    model_dir: Path
    """Hugging Face checkpoint: the architecture, and the weights where `serve_loaded`."""
    tokenizer: PreTrainedTokenizerBase
    work_dir: Path
    """For logs of servers, and weights of a sync by disk."""
    max_prompt_tokens: int
    max_response_tokens: int
    """Longest prompt and response that will be asked for (`data.max_prompt_tokens`, `data.max_response_tokens`)."""
    device: torch.device = torch.device("cpu")
    """The trainer's device."""
    dtype: torch.dtype = torch.float32
    """Of the served weights."""
    fp32_logits: bool = True
    """`model.fp32_logits`: float32 logits where the weights have 16 bits."""
    serve_loaded: bool = False
    """Serve the checkpoint as it is, as version 0 (judging, evaluation); else `update_weights` comes first."""

    @property
    def max_tokens(self) -> int:
        """Longest prompt and response together."""
        return self.max_prompt_tokens + self.max_response_tokens

    def hf_config(self) -> PretrainedConfig:
        """The model's configuration; remote code is never run. Raises CheckpointError."""
        return read_config(self.model_dir)

    def stop_ids(self) -> list[int]:
        """The tokens at which a response ends, ascending: the same for every engine. Raises CheckpointError."""
        return stop_ids(self.model_dir, self.tokenizer)


@dataclass(frozen=True)
class ServerCommand:
    """How one local server is started."""

    arguments: list[str]
    key_variable: str
    """Environment variable from which it takes its API key: other users of the machine see its arguments."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set in addition to those of this process."""


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine that `rollout.engine` can name."""

    build: Callable[[EngineSpec], RolloutEngine]
    on_every_rank: bool = False
    """Each rank of the run holds an engine of its own and serves some of the prompts. False: rank 0 holds the only one,
    in front of servers."""
    server_package: str = ""
    """The Python package that its servers run, where it attaches to `rollout.servers` or starts its own."""
    broadcasts: bool = False
    """Weights can reach its servers by a broadcast from this host, the default where they do not share its GPUs."""
    reserved_tokens: int = 0
    """Of a model's positions, how many it keeps free."""
    server_command: Callable[[EngineSpec, int, int, int], ServerCommand] | None = None
    """How local server number `index` is started: (spec, index, port, longest prompt and response together)."""


ENGINES: Registry[EngineKind] = Registry(
    "engine",
    "rollout.engine",
    built_in={
        "transformers": "real_megatron.rollout.embedded.engine",
        "sglang": "real_megatron.rollout.sglang.engine",
        "vllm": "real_megatron.rollout.vllm.engine",
    },
)


Builder = TypeVar("Builder", bound=Callable[[EngineSpec], RolloutEngine])


def register_engine(
    name: str,
    *,
    on_every_rank: bool = False,
    server_package: str = "",
    broadcasts: bool = False,
    reserved_tokens: int = 0,
    server_command: Callable[[EngineSpec, int, int, int], ServerCommand] | None = None,
) -> Callable[[Builder], Builder]:
    """Decorator for a class or function that builds a `RolloutEngine` from an `EngineSpec`. See docs/extending.md.

    on_every_rank: each rank builds one and serves some of the prompts; else rank 0 builds the only one
    server_package: the Python package that its servers run: `rollout.servers`, or those that it starts
    broadcasts: weights can reach these servers by a broadcast from this host (`rollout.sync_host`)
    reserved_tokens: of a model's positions, how many it keeps free: prompts and responses have no room there
    server_command: how a local server is started (`EngineKind.server_command`), where it starts some
    """
    module = calling_module()

    def add(build: Builder) -> Builder:
        kind = EngineKind(build, on_every_rank, server_package, broadcasts, reserved_tokens, server_command)
        ENGINES.register(name, kind, module)
        return build

    return add


def drain(stream: Iterable[Any]) -> None:
    """Consume what is left of a stream. A collective export must be iterated to its end on every rank."""
    for _ in stream:
        pass


def check_ids(sequences: Sequence[list[int]], vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise PromptRefused, naming the token, for the first sequence that is empty or has an id outside the model's
    vocabulary."""
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise PromptRefused(i, "the sequence is empty")
        if min(sequence) < 0 or max(sequence) >= vocab_size:
            outside = next(id for id in sequence if not 0 <= id < vocab_size)
            token = tokenizer.convert_ids_to_tokens(outside) if 0 <= outside < len(tokenizer) else None
            raise PromptRefused(
                i,
                f"the sequence has the token {'' if token is None else f'{token!r}, '}id {outside}, outside the "
                f"vocabulary of {vocab_size} (vocab_size in config.json): leave it out of the prompt",
            )


@contextmanager
def naming_prompts(names: Sequence[str]) -> Iterator[None]:
    """Turn PromptRefused into a DataError with the prompt's name, for callers that do not go on without it; and put
    that name in front of a BadResponse's message."""
    try:
        yield
    except PromptRefused as refusal:
        raise DataError(f"{names[refusal.index]}: {refusal}") from None
    except BadResponse as bad:
        raise EngineError(f"{names[bad.index]}: {bad}") from None

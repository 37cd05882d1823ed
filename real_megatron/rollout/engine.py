"""The protocol that every rollout engine fulfils. Knows neither Megatron nor training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


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
    """`stop` (a stop text was produced), `eos` (the end-of-sequence token is the last token) or `length`."""
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
        """
        ...

    def next_token_logprobs(self, sequences: Sequence[list[int]], ids: Sequence[int]) -> Tensor:
        """Log-probabilities (T = 1, whole vocabulary) of the tokens `ids` as continuation of each sequence.

        Returns fp32 `[len(sequences), len(ids)]` on CPU. This is RAIL's score distribution.
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
        """Raise RuntimeError, saying what is wrong, when the engine cannot serve."""
        ...

    def close(self) -> None: ...

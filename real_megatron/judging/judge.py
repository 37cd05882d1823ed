"""A judge: a checkpoint behind an engine, with the scale, prompts and sampling of its configuration."""

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from real_megatron.config import RunConfig
from real_megatron.data import Template, encode_prompt, example_from_record, fit_prompt, load_template
from real_megatron.errors import DataError
from real_megatron.hf.directory import check_vocabulary, checkpoint_directory, load_tokenizer
from real_megatron.judging.reading import Answer, Reading, answers_of, example_seed, mean_answer, read_response
from real_megatron.judging.settings import judge_config
from real_megatron.rollout.distributed import collect
from real_megatron.rollout.embedded.seeded import uniforms
from real_megatron.rollout.engine import EngineSpec, RolloutEngine, SamplingParams, naming_prompts
from real_megatron.rollout.factory import build_engine, check_servers
from real_megatron.rollout.scoring import sample_scored
from real_megatron.runtime import default_device, default_dtype, host_group
from real_megatron.scores import ScoreScale

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, str]] | Mapping[str, Any]
"""A text; chat messages, each with `role` and `content`; or a record with the fields of the judge's template."""


@dataclass(frozen=True)
class AspectScore:
    """What a judge says of one aspect (`scale.aspects`); the fields are as of `Score`."""

    score: float
    score_renormalized: float
    score_mass: float
    distribution: dict[str, float]
    sampled_score: float


@dataclass(frozen=True)
class Score:
    """A judge's answer to one prompt. With several critiques the numbers are means over those that have a score, and
    critique, no_anchor and truncated are the first one's. With several aspects they are means by weight."""

    score: float | None
    """Expected score (RAIL), as the judge was trained (`scale.probabilities`): `full` is Σ_k v_k π(k) over the whole
    vocabulary, and so below the scale where other tokens have a part of the probability (0.2 on a scale of 1 to 5 is
    possible); `renormalized` is `score_renormalized`. None where no critique came to its score."""
    score_renormalized: float | None
    """Expected score given that it is one of the scale: Σ_k v_k π(k) / Σ_k π(k). Always within the scale; says nothing
    of how little `score_mass` it may rest on."""
    score_mass: float | None
    """Σ_k π(k), the probability that what follows the anchor is a score at all. Near 1 for a trained judge."""
    distribution: dict[str, float] | None
    """Score text → π(k), its probability over the whole vocabulary; the sum is `score_mass`. None with aspects."""
    sampled_score: float | None
    """The value of a score drawn from the distribution, renormalised over the scale."""
    critique: str
    """The critique, up to the score's anchor."""
    no_anchor: bool
    """The critique did not come to the anchor by itself. Its score, if it has one, was read behind an anchor that was
    appended (`evaluation.no_anchor: force`)."""
    truncated: bool
    """It did not because it was cut at `data.max_response_tokens`."""
    samples: list["Score"] = field(default_factory=list)
    """Each critique with its own score, where there are several."""
    aspects: dict[str, AspectScore] = field(default_factory=dict)
    """Where the judge's scale has aspects, what it says of each."""


class Judge:
    """A checkpoint that can be asked. Close it, or use it as a context manager, to end its servers.

    engine: serves the model; or a function that starts it, called for the first question
    tokenizer, scale: of the model
    config: its `scale`, `data` (template and lengths), `evaluation` (sampling) and `seed` decide what is asked
    name: what results call the model

    Under several ranks with an engine of all ranks, every method is collective. `score` and `read` return their results
    on rank 0, and an empty list on the others: each rank reads what its engine has generated, and sends it to rank 0.
    """

    def __init__(
        self,
        engine: RolloutEngine | Callable[[], RolloutEngine],
        tokenizer: PreTrainedTokenizerBase,
        scale: ScoreScale,
        config: RunConfig,
        name: str = "",
    ) -> None:
        self._engine = engine
        self.tokenizer = tokenizer
        self.scale = scale
        self.config = config
        self.name = name
        self.directory: Path | None = None
        """Of the checkpoint, where the judge was loaded from one."""
        self.prompts_cut = 0
        """How many prompts `encode` has cut (`data.long_prompts: cut_left`)."""
        self._template: Template | None = None
        self._scratch: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        engine: str | None = None,
        revision: str | None = None,
        config: RunConfig | None = None,
        overrides: Sequence[str] = (),
        work_dir: Path | None = None,
        start: bool = True,
    ) -> Self:
        """A judge from a Hugging Face checkpoint.

        model: a directory, or a name on the hub (with `revision`: a branch, tag or commit).
        engine: `transformers` (in this process, the default), `sglang` or `vllm` (starts servers), or `module:name`.
        config: a whole configuration; default: what training left beside the weights of scale, prompts and sampling
            (see `judge_config`).
        overrides: `key=value` as on the command line, for example `rollout.python=…`, `scale.scores=[A, B, C]`.
        work_dir: for logs of servers; default: a temporary directory.
        start: start the engine now; else with the first question, when other things have been checked.

        Raises CheckpointError, ConfigError or EngineError, each saying what is wrong.
        """
        directory = checkpoint_directory(model, revision)
        chosen = [f"rollout.engine={engine}"] if engine is not None else []
        if config is None:
            config = judge_config(directory, [*chosen, *overrides])
        elif chosen or overrides:
            config = config.with_overrides([*chosen, *overrides])
        check_servers(config.rollout, trainer=False)
        tokenizer = load_tokenizer(directory)
        scale = ScoreScale.of(tokenizer, config.scale)
        # Other tokens beyond the vocabulary matter where a prompt has one, which the engine then refuses.
        check_vocabulary(directory, tokenizer, [*scale.tree.token_ids, *scale.anchor_ids])
        scratch = None
        if work_dir is None:  # removed by close(); left there if the engine fails, since its logs say why
            work_dir = scratch = Path(tempfile.mkdtemp(prefix="judge-"))
        spec = EngineSpec(
            config=config.rollout,
            model_dir=directory,
            tokenizer=tokenizer,
            work_dir=work_dir,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_response_tokens=config.data.max_response_tokens,
            device=default_device(),
            dtype=default_dtype(config.model.dtype),
            fp32_logits=config.model.fp32_logits,
            serve_loaded=True,
        )
        timeout = config.parallel.timeout_minutes
        name = str(model) if revision is None else f"{model}@{revision}"
        judge = cls(lambda: build_engine(spec, host_group(timeout)), tokenizer, scale, config, name)
        judge.directory, judge._scratch = directory, scratch
        if start:
            _ = judge.engine
        return judge

    @property
    def engine(self) -> RolloutEngine:
        """The engine, started now if it has not been. Collective then."""
        if callable(self._engine):
            self._engine = self._engine()
        return self._engine

    def score(self, prompts: Sequence[Prompt], critiques: int = 1) -> list[Score]:
        """Judge each prompt with `critiques` sampled critiques.

        A prompt is a text, a list of chat messages, or a record with the fields of the template. The same prompt gets
        the same critiques wherever it stands in the list (engines that seed their sampling: transformers).

        Prompts beyond `data.max_prompt_tokens` lose their beginning if `data.long_prompts` is `cut_left`, which is
        logged.

        Under several ranks: on rank 0; an empty list on the others.

        Raises DataError, naming the prompt's number from 0, for one that is empty or too long.
        """
        if isinstance(prompts, (str, bytes, Mapping)):
            raise TypeError("score() takes a list of prompts: put this one into a list")
        before = self.prompts_cut
        encoded = [self.encode(_record(prompt), f"prompt {i}") for i, prompt in enumerate(prompts)]
        if self.prompts_cut > before:
            logger.warning("cut the beginning of %d of %d prompts", self.prompts_cut - before, len(prompts))
        ids = [hashlib.blake2b(repr(prompt).encode(), digest_size=8).hexdigest() for prompt in encoded]
        with naming_prompts([f"prompt {i}" for i in range(len(encoded))]):
            return [self.summary(readings) for readings in self.read(encoded, ids, critiques)]

    def encode(self, record: Mapping[str, Any], where: str) -> list[int]:
        """Token ids of a record's prompt (`prompt`, `messages` or the template's fields).

        Raises DataError that begins with `where` for a record without a prompt, or with too long a one (unless
        `data.long_prompts` is `cut_left`, which is counted in `prompts_cut`).
        """
        if self._template is None:
            self._template = load_template(self.config.data.template)
        example = example_from_record(record, self._template, where, where)
        data = self.config.data
        whole = encode_prompt(self.tokenizer, example, data)
        ids = fit_prompt(self.tokenizer, whole, data)
        if ids is None:
            raise DataError(
                f"{where}: the prompt has {len(whole)} tokens, more than data.max_prompt_tokens = "
                f"{data.max_prompt_tokens}"
            )
        self.prompts_cut += len(ids) < len(whole)
        return ids

    def params(self, critiques: int | None = None) -> SamplingParams:
        """How critiques are sampled: `evaluation.samples` of them a prompt, unless told otherwise."""
        config = self.config
        return SamplingParams(
            n=config.evaluation.samples if critiques is None else critiques,
            temperature=config.evaluation.temperature,
            top_p=config.evaluation.top_p,
            max_new_tokens=config.data.max_response_tokens,
        )

    def read(
        self, prompts: Sequence[list[int]], ids: Sequence[str], critiques: int | None = None
    ) -> list[list[Reading]]:
        """Sampled critiques of each prompt (token ids), with the scores behind them.

        Critiques and drawn scores depend on the seed, the prompt's id and the weights, not on the other prompts. A
        critique without an anchor gets one appended, or stays without a score (`evaluation.no_anchor`).

        Under several ranks: on rank 0; an empty list on the others.

        Raises PromptRefused for a prompt that the engine cannot take, EngineError for a model that cannot score.
        """

        def serve(engine: RolloutEngine, indices: list[int]) -> list[list[Reading]]:
            return self._read(engine, [prompts[i] for i in indices], [ids[i] for i in indices], critiques)

        return collect(self.engine, [len(prompt) for prompt in prompts], serve)

    def _read(
        self, engine: RolloutEngine, prompts: Sequence[list[int]], ids: Sequence[str], critiques: int | None
    ) -> list[list[Reading]]:
        """`read` with the engine of one rank."""
        seed = self.config.seed
        groups = sample_scored(
            engine,
            self.tokenizer,
            self.scale,
            prompts,
            self.params(critiques),
            self.config.evaluation.no_anchor,
            [example_seed(seed, "critique", id) for id in ids],
        )
        renormalized = self.config.scale.probabilities == "renormalized"
        rows = []
        for id, group in zip(ids, groups, strict=True):
            aspects = len(self.scale.parts)
            draws = [uniforms(example_seed(seed, "score", id), k, aspects).tolist() for k in range(len(group))]
            rows.append(
                [
                    read_response(self.tokenizer, self.scale, response, draw, renormalized)
                    for response, draw in zip(group, draws, strict=True)
                ]
            )
        return rows

    def summary(self, readings: Sequence[Reading]) -> Score:
        """The readings of one prompt as one score."""
        samples = [self._score([reading]) for reading in readings]
        return self._score(readings, samples) if len(samples) > 1 else samples[0]

    def _score(self, readings: Sequence[Reading], samples: Sequence[Score] = ()) -> Score:
        answer = mean_answer(answers_of(readings))
        first = readings[0]
        return Score(
            None if answer is None else answer.expected,
            None if answer is None else answer.renormalized,
            None if answer is None else answer.mass,
            None if answer is None or self.scale.aspects else _distribution(self.scale.texts, answer),
            None if answer is None else answer.sampled,
            first.critique,
            first.no_anchor,
            first.truncated,
            list(samples),
            {} if answer is None else self._aspects(answer),
        )

    def _aspects(self, answer: Answer) -> dict[str, AspectScore]:
        return {
            aspect.name: AspectScore(
                own.expected, own.renormalized, own.mass, _distribution(aspect.texts, own), own.sampled
            )
            for aspect, own in zip(self.scale.aspects, answer.aspects, strict=True)
        }

    def close(self) -> None:
        """End the engine and the servers that it started."""
        if not callable(self._engine):
            self._engine.close()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _distribution(texts: Sequence[str], answer: Answer) -> dict[str, float]:
    return dict(zip(texts, answer.probabilities, strict=True))


def _record(prompt: Prompt) -> Mapping[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return prompt if isinstance(prompt, Mapping) else {"messages": [dict(message) for message in prompt]}

"""Examples as tokens: prompts, and supervised targets."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group, Trajectory
from real_megatron.config import DataConfig
from real_megatron.data.control_tokens import ControlTokens, encode_plain
from real_megatron.data.example import JudgeExample
from real_megatron.data.lazy import LazySequence, TokenRows
from real_megatron.data.stored_groups import StoredGroups
from real_megatron.errors import ConfigError, DataError
from real_megatron.scores import CONTEXT, EOS, ScoreScale, decode

logger = logging.getLogger(__name__)

CHUNK = 1000
"""Texts that are tokenised at a time: what a tokenizer returns holds a hundred bytes a token."""
_MARK = "@answer@"
THINKING = re.compile(r"<([\w:]*think[\w:]*)>\s*$|\[(THINK)\]\s*$")
"""The beginning of a thinking block, at the end of a prompt."""


class KeptPrompts(LazySequence[tuple[JudgeExample, list[int]]]):
    """Examples, each with the token ids of its prompt; of these a list is made when it is asked for."""

    def __init__(self, examples: Sequence[JudgeExample], rows: TokenRows) -> None:
        self._examples, self._rows = examples, rows

    def __len__(self) -> int:
        return len(self._examples)

    def _make(self, index: int) -> tuple[JudgeExample, list[int]]:
        return self._examples[index], self._rows[index]


@dataclass(frozen=True)
class EncodedPrompts:
    """Examples with the token ids of their prompts, and how many prompts were too long."""

    kept: KeptPrompts
    dropped: int
    cut: int
    """Of the kept ones, those that lost their beginning."""


@dataclass(frozen=True)
class EncodedGroups:
    """Examples as groups of tokens, and how many were too long."""

    groups: StoredGroups
    dropped: int
    """Examples that are left out, since their prompt or their response is too long."""
    cut: int
    """Examples whose prompt lost its beginning."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: JudgeExample, data: DataConfig) -> list[int]:
    """Token ids of the prompt, to be continued by a response, at any length.

    Written with the tokenizer's chat template and `data.chat_template_args`, if it has one and `data.chat_template` is
    true; else the messages' contents, separated by blank lines. A thinking block that the template begins at the end is
    closed there as Qwen3's prompts without thinking do, so that critique and score stand behind it.

    Control tokens come from the chat template alone (see `ControlTokens`). Begin-of-sequence tokens come from it too,
    or without one from the tokenizer; an end-of-sequence token is never added.

    Raises DataError for an empty prompt, for messages that the chat template refuses, and for control tokens in the
    text that the tokenizer cannot read as text.
    """
    return _encode(tokenizer, [example], data)[0][0]


def fit_prompt(tokenizer: PreTrainedTokenizerBase, ids: list[int], data: DataConfig) -> list[int] | None:
    """A prompt of at most `data.max_prompt_tokens`: itself, or its end behind its begin-of-sequence token
    (`data.long_prompts: cut_left`), or None (`drop`)."""
    longest = data.max_prompt_tokens
    if len(ids) <= longest:
        return ids
    if data.long_prompts == "drop":
        return None
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id and longest > 1 else []
    return begin + ids[len(ids) - longest + len(begin) :]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[JudgeExample], data: DataConfig
) -> EncodedPrompts:
    """The examples with their prompts (see `encode_prompt`) of at most `data.max_prompt_tokens`; longer ones are
    dropped or cut (`data.long_prompts`), counted and logged.

    Tokenises `CHUNK` texts at a time, on all cores.
    """
    kept: list[JudgeExample] = []
    rows = TokenRows()
    careful: list[str] = []
    long = 0
    for begin in range(0, len(examples), CHUNK):
        chunk = examples[begin : begin + CHUNK]
        encoded, marked = _encode(tokenizer, chunk, data)
        careful += marked
        for example, row in zip(chunk, encoded, strict=True):
            long += len(row) > data.max_prompt_tokens
            if (ids := fit_prompt(tokenizer, row, data)) is not None:
                kept.append(example)
                rows.append(ids)
    dropped = len(examples) - len(kept)
    if long:
        logger.warning(
            "%s %d of %d examples whose prompt is longer than %d tokens (data.max_prompt_tokens)",
            "dropped" if dropped else "cut the beginning of",
            long,
            len(examples),
            data.max_prompt_tokens,
        )
    if careful:
        logger.warning(
            "the prompts of %d of %d examples contain control tokens of the model, the first is %s: they are encoded "
            "as ordinary text",
            len(careful),
            len(examples),
            careful[0],
        )
    return EncodedPrompts(KeptPrompts(kept, rows), dropped, long - dropped)


def end_of_response(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], data: DataConfig) -> int | None:
    """The token that ends a response: what the chat template writes behind an assistant's turn, if generation stops at
    it, else the tokenizer's end of sequence (None without one).

    stop_ids: the tokens at which generation stops. Llama 3's template ends a turn with <|eot_id|>, where a tokenizer's
    own end of sequence may be <|end_of_text|>. A base model's template may end turns with a token at which its
    generation does not stop: then its end of sequence is the right one.
    """
    if _templated(tokenizer, data):
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            written: str = tokenizer.apply_chat_template(turns, tokenize=False, **data.chat_template_args)
            behind = written.rpartition(_MARK)[2]
        except Exception:  # whatever a Jinja template raises: it takes other roles only
            behind = ""
        for token in tokenizer.encode(behind, add_special_tokens=False):
            if token in stop_ids:
                return int(token)
    eos: int | None = tokenizer.eos_token_id
    return eos


def encode_target(
    tokenizer: PreTrainedTokenizerBase, scale: ScoreScale, example: JudgeExample, end: int | None = None
) -> Trajectory:
    """The supervised response of an example: CoT, anchor, score, and the token `end` (see `end_of_response`; None: the
    tokenizer's end of sequence, if it has one).

    A CoT that contains the anchor ends before it; the CoT stands on a line of its own before the anchor. Anchor and
    score are the scale's own tokens and not those of the whole text tokenised at once, so that training and generation
    agree on them. Texts of special tokens in the CoT are ordinary text; other added tokens, such as `<think>`, stay
    tokens, since the model may write them itself. The score is the one nearest to the label, in its first spelling. Its
    tokens carry no token loss: their likelihood is that of the answer (`score_logprobs`). Neither does the end behind a
    score that could go on to another where `scale.ends` says what ends it, since the answer's likelihood holds it too.
    Every other token does. With several aspects the response ends at the anchor, behind which each score is read alone.

    Raises DataError for an example without a CoT or a label; ConfigError where `scale.ends` lacks the end of a target.
    """
    if example.cot is None:
        raise DataError(f"example {example.id} has no critique: supervised training needs 'cot' in every record")
    if not example.has_label:
        raise DataError(f"example {example.id} has no label: supervised training needs one in every record")
    cot = example.cot.partition(scale.anchor_text.strip())[0].strip()
    cot_ids = encode_plain(tokenizer, cot + CONTEXT, f"example {example.id}") if cot else []
    before = cot_ids + scale.anchor_ids
    if scale.aspects:
        return Trajectory(response_ids=before, answer_index=len(before) - 1, finish_reason="given")
    tree, index = scale.tree, scale.label_index(example.label)
    score = tree.paths[index]
    end = tokenizer.eos_token_id if end is None else end
    if tree.ends and end not in tree.ends:
        _refuse_end(tokenizer, end)
    ending = [] if end is None else [end]
    ends_the_score = bool(tree.ends) and tree.could_go_on(index)
    return Trajectory(
        response_ids=[*before, *score, *ending],
        answer_index=len(before) - 1,
        loss_mask=[True] * len(before) + [False] * len(score) + [not ends_the_score] * len(ending),
        finish_reason="given",
    )


def _refuse_end(tokenizer: PreTrainedTokenizerBase, end: int | None) -> NoReturn:
    if end is None:
        raise ConfigError(
            "scale.ends: this tokenizer has no end of sequence, so that nothing follows the score of a supervised "
            "response; leave scale.ends empty"
        )
    text = decode(tokenizer, [end])
    name = EOS if end == tokenizer.eos_token_id else text
    raise ConfigError(f"scale.ends: supervised responses end with {text!r}, which is none of them; add {name!r}")


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    examples: Sequence[JudgeExample],
    data: DataConfig,
    stop_ids: Sequence[int] = (),
) -> EncodedGroups:
    """Groups of one supervised response each. Too long prompts are dropped or cut (`data.long_prompts`), responses
    beyond `data.max_response_tokens` are dropped; both are counted and logged.

    stop_ids: the tokens at which the checkpoint's generation stops (see `end_of_response`)
    """
    end = end_of_response(tokenizer, stop_ids, data)
    prompts = encode_prompts(tokenizer, examples, data)
    short = prompts.kept
    targets = (
        Group(ids, [encode_target(tokenizer, scale, example, end)], example.label, example.id, {}, example.labels)
        for example, ids in short
    )
    groups = StoredGroups.of(
        group for group in targets if len(group.trajectories[0].response_ids) <= data.max_response_tokens
    )
    if len(groups) < len(short):
        logger.warning(
            "dropped %d of %d examples whose response is longer than %d tokens (data.max_response_tokens)",
            len(short) - len(groups),
            len(short),
            data.max_response_tokens,
        )
    return EncodedGroups(groups, len(examples) - len(groups), prompts.cut)


def _encode(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[JudgeExample], data: DataConfig
) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt; and the ids of those examples whose text contains control tokens."""
    templated = _templated(tokenizer, data)
    control = ControlTokens.of(tokenizer)
    careful: dict[int, str] = {}
    texts = []
    for index, example in enumerate(examples):
        messages = example.messages
        if any(control.find(text, _shown(m, templated)) for m in messages for text in m.values()):
            careful[index] = example.id
            messages = [{k: control.hide(text, _shown(m, templated)) for k, text in m.items()} for m in messages]
        texts.append(_prompt_text(tokenizer, messages, example.id, data) if templated else _plain_text(messages))
    ordinary = [text for index, text in enumerate(texts) if index not in careful]
    add = not templated
    rows = iter(_encode_ordinary(tokenizer, ordinary, add))
    encoded = []
    for index, (example, text) in enumerate(zip(examples, texts, strict=True)):
        where = f"example {example.id}"
        row = control.encode(text, where, add) if index in careful else next(rows)
        if add and row and row[-1] == tokenizer.eos_token_id:
            row.pop()  # some tokenizers end every text with it
        if not row:
            raise DataError(f"{where}: the prompt is empty; give it a text")
        encoded.append(row)
    return encoded, list(careful.values())


def _encode_ordinary(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False)[
        "input_ids"
    ]
    return rows


def _templated(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> bool:
    return data.chat_template and bool(tokenizer.chat_template)


def _shown(message: dict[str, str], templated: bool) -> bool:
    """Whether a message shows the judge a text of others. In its own turns, `<think>` may be its own."""
    return templated and message["role"] != "assistant"


def _plain_text(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _prompt_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], id: str, data: DataConfig) -> str:
    """The messages in the tokenizer's chat template, up to where the response begins."""
    begun = messages[-1]["role"] == "assistant"
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **data.chat_template_args,
        )
    except Exception as error:  # whatever a Jinja template raises
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"example {id}: the tokenizer's chat template refuses messages of the roles {roles}: {error}; "
            "use other roles, for example write the system message's text at the beginning of the user's"
        ) from error
    opened = None if THINKING.search(messages[-1]["content"]) else THINKING.search(text)
    if opened is None:
        return text
    end = f"</{opened[1]}>" if opened[1] else f"[/{opened[2]}]"
    _log_closed(opened[0].strip(), end)
    return text.rstrip() + f"\n\n{end}\n\n"


@cache
def _log_closed(begin: str, end: str) -> None:
    logger.info("the chat template ends prompts with %s: %s follows, so that responses begin behind it", begin, end)

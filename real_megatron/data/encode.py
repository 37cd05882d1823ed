"""Examples as tokens: prompts, and supervised targets."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from real_megatron.batch.types import Group, Trajectory
from real_megatron.data.example import JudgeExample
from real_megatron.errors import DataError
from real_megatron.scores import CONTEXT, ScoreScale

logger = logging.getLogger(__name__)

_MARK = "@answer@"


def prompt_text(tokenizer: PreTrainedTokenizerBase, example: JudgeExample, chat_template: bool = True) -> str:
    """The prompt as text, up to where the response begins.

    Written with the tokenizer's chat template if it has one and `chat_template` is true; else the messages' contents,
    separated by blank lines. Raises DataError if the chat template refuses the messages.
    """
    messages = example.messages
    if not _templated(tokenizer, chat_template):
        return "\n\n".join(message["content"] for message in messages)
    begun = messages[-1]["role"] == "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:  # whatever a Jinja template raises
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"example {example.id}: the tokenizer's chat template refuses messages of the roles {roles}: {error}; "
            "use other roles, for example write the system message's text at the beginning of the user's"
        ) from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: JudgeExample, chat_template: bool = True) -> list[int]:
    """Token ids of the prompt, to be continued by a response.

    Begin-of-sequence tokens come from the chat template, or without one from the tokenizer; an end-of-sequence token is
    never added. Raises DataError for an empty prompt, and as `prompt_text`.
    """
    return _encode_prompts(tokenizer, [example], chat_template)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[JudgeExample],
    max_tokens: int,
    chat_template: bool = True,
) -> list[tuple[JudgeExample, list[int]]]:
    """The examples whose prompt has at most `max_tokens` tokens, each with its ids; the others are counted and logged.

    Tokenises in one batch, on all cores.
    """
    encoded = zip(examples, _encode_prompts(tokenizer, examples, chat_template), strict=True)
    kept = [(example, ids) for example, ids in encoded if len(ids) <= max_tokens]
    if len(kept) < len(examples):
        logger.warning(
            "dropped %d of %d examples whose prompt is longer than %d tokens (data.max_prompt_tokens)",
            len(examples) - len(kept),
            len(examples),
            max_tokens,
        )
    return kept


def end_of_response(
    tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], chat_template: bool = True
) -> int | None:
    """The token that ends a response: what the chat template writes behind an assistant's turn, if generation stops at
    it, else the tokenizer's end of sequence (None without one).

    stop_ids: the tokens at which generation stops. Llama 3's template ends a turn with <|eot_id|>, where a tokenizer's
    own end of sequence may be <|end_of_text|>. A base model's template may end turns with a token at which its
    generation does not stop: then its end of sequence is the right one.
    """
    if _templated(tokenizer, chat_template):
        turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
        try:
            behind = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_MARK)[2]
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
    agree on them. The score is the one nearest to the label. Its token carries no token loss (its
    likelihood is that of the answer position, the last anchor token); every other token does.

    Raises DataError for an example without a CoT or a label.
    """
    if example.cot is None:
        raise DataError(f"example {example.id} has no critique: supervised training needs 'cot' in every record")
    if not example.has_label:
        raise DataError(f"example {example.id} has no label: supervised training needs one in every record")
    cot = example.cot.partition(scale.anchor_text.strip())[0].strip()
    cot_ids = tokenizer.encode(cot + CONTEXT, add_special_tokens=False) if cot else []
    score = scale.score_ids[scale.label_index(example.label)]
    end = tokenizer.eos_token_id if end is None else end
    ending = [] if end is None else [end]
    before = cot_ids + scale.anchor_ids
    return Trajectory(
        response_ids=[*before, score, *ending],
        answer_index=len(before) - 1,
        loss_mask=[True] * len(before) + [False] + [True] * len(ending),
        finish_reason="given",
    )


def encode_targets(
    tokenizer: PreTrainedTokenizerBase,
    scale: ScoreScale,
    examples: Sequence[JudgeExample],
    max_prompt_tokens: int,
    max_response_tokens: int,
    chat_template: bool = True,
    stop_ids: Sequence[int] = (),
) -> list[Group]:
    """Groups of one supervised response each; too long prompts and responses are dropped, counted and logged.

    stop_ids: the tokens at which the checkpoint's generation stops (see `end_of_response`)
    """
    groups = []
    end = end_of_response(tokenizer, stop_ids, chat_template)
    short = encode_prompts(tokenizer, examples, max_prompt_tokens, chat_template)
    for example, prompt_ids in short:
        target = encode_target(tokenizer, scale, example, end)
        if len(target.response_ids) <= max_response_tokens:
            groups.append(Group(prompt_ids, [target], example.label, example.id))
    if len(groups) < len(short):
        logger.warning(
            "dropped %d of %d examples whose response is longer than %d tokens (data.max_response_tokens)",
            len(short) - len(groups),
            len(short),
            max_response_tokens,
        )
    return groups


def _templated(tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> bool:
    return chat_template and bool(tokenizer.chat_template)


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[JudgeExample], chat_template: bool
) -> list[list[int]]:
    if not examples:
        return []
    texts = [prompt_text(tokenizer, example, chat_template) for example in examples]
    special = not _templated(tokenizer, chat_template)
    rows = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
    for example, row in zip(examples, rows, strict=True):
        if special and row and row[-1] == tokenizer.eos_token_id:
            row.pop()  # some tokenizers end every text with it
        if not row:
            raise DataError(f"example {example.id}: the prompt is empty; give it a text")
    return rows

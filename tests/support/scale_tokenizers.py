"""Tokenizers of every common kind, made from a few merges or words, for tests of score scales."""

import functools
from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.real_tokenizers import real_tokenizer

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
DIGITS = list("12345")
TEN = [str(k) for k in range(1, 11)]
LETTERS = list("ABCDE")


def wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def merge_rules(words: Iterable[str]) -> list[tuple[str, str]]:
    """BPE merges that build each word from left to right."""
    return list(dict.fromkeys((w[:i], w[i]) for w in words for i in range(1, len(w))))


def byte_level(words: Iterable[str] = (), pattern: str | None = None, reverse: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2-like BPE (`pattern` None), or Llama-3- and Qwen-like with their pre-tokenizer's regex."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    merges = merge_rules(words)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*alphabet, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def gpt2() -> PreTrainedTokenizerFast:
    """Digits and letters swallow the space before them."""
    return byte_level([*(f"Ġ{k}" for k in TEN), *(f"Ġ{k}" for k in LETTERS), "RESULT", "good", "Ġgood"])


def llama3() -> PreTrainedTokenizerFast:
    return byte_level(["RESULT", "10", "12", "Ġgood", "ĠA", "ĠB", "ĠC", "ĠD", "ĠE", ".Ċ", "ĊĊ"], LLAMA3)


def qwen() -> PreTrainedTokenizerFast:
    return byte_level(["RESULT", "Ġgood", "ĠA", "ĠB", "ĠC", "ĠD", "ĠE", ".Ċ", "ĊĊ"], QWEN)


def sentencepiece(joined: bool) -> PreTrainedTokenizerFast:
    """Llama-2- and Mistral-like: "▁" for spaces and at the start of a text, bytes for unknown characters. `joined`:
    "▁4" is one token."""
    words = ["▁RESULT", "RESULT", "▁good", "▁["] + [f"▁{k}" for k in (*TEN[:9], *LETTERS)] * joined
    letters = sorted(set("".join(words)) | set("0123456789ABCDE▁[]():.,abcdefghijklmnopqrstuvwxyz"))
    merges = merge_rules(words)
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *letters, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer, unk_token="<unk>")


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """T5-like: no newlines, no bytes."""
    pieces = [("<unk>", 0.0), *((c, -6.0) for c in "▁[]RESULTgodABCDE12345"), ("▁good", -2.0), ("▁[RESULT]", -2.0)]
    pieces += [(f"▁{k}", -2.0) for k in (*DIGITS, *LETTERS)]
    tokenizer = Tokenizer(models.Unigram([p for i, p in enumerate(pieces) if p not in pieces[:i]], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrap(tokenizer, unk_token="<unk>")


def word_level(split: str = "spaces") -> PreTrainedTokenizerFast:
    words = ["<unk>", "good", "[RESULT]", "[", "]", "RESULT", *TEN, *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if split == "spaces" else pre_tokenizers.Whitespace()
    return wrap(tokenizer, unk_token="<unk>")


KINDS: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], str]] = {
    # tokenizer, and the effective anchor text of digits after "[RESULT] "
    "gpt2": (gpt2, "[RESULT]"),
    "bytes": (byte_level, "[RESULT] "),
    "llama3": (llama3, "[RESULT] "),
    "qwen": (qwen, "[RESULT] "),
    "mistral": (lambda: sentencepiece(joined=False), "[RESULT] "),
    "sentencepiece-joined": (lambda: sentencepiece(joined=True), "[RESULT]"),
    "unigram": (metaspace_unigram, "[RESULT]"),
    "words": (word_level, "[RESULT]"),
    "words-and-signs": (lambda: word_level("signs"), "[ RESULT ]"),
}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`, or `real_NAME`, one of a real model: that skips the test where its file is absent."""
    return KINDS[kind][0]() if kind in KINDS else real_tokenizer(kind.removeprefix("real_"))

"""Text from data as tokens without control tokens: a judged answer that contains `<|im_end|>` must not end a turn."""

import json
import re
import secrets
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from real_megatron.errors import DataError

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class ControlTokens:
    """A tokenizer's control tokens, and a way to tell those of a chat template from the same texts in data.

    Control tokens are the special tokens and those added tokens that the chat template writes, such as `<think>` or
    DeepSeek's `<｜User｜>`. The latter are control tokens in what a judge is shown (`shown`), not in what a model
    writes itself. Markers that are ordinary text to the tokenizer (Llama 2's `[INST]`) are none: nothing can separate
    them.

    Texts of control tokens are first hidden in the data (`hide`), which puts marks into their places. What the chat
    template then makes of the data holds only its own control tokens, and `encode` gives these other names. A copy of
    the tokenizer knows control tokens by those names alone, so that the texts behind the marks are ordinary text to
    it. It encodes the whole at once: nothing is cut into pieces, so spaces and merges are the tokenizer's own.

    Names and marks contain a random number, so that no data can contain them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = _template_source(tokenizer)
        # SentencePiece's bytes may be marked as special, but they are how ordinary text is written.
        tokens = [item for item in tokenizer.added_tokens_decoder.items() if not _BYTE.fullmatch(item[1].content)]
        special = [token.content for _, token in tokens if token.special]
        written = [token.content for _, token in tokens if not token.special and _is_marker(token.content, template)]
        self._ids = {token.content: id for id, token in tokens if token.content in {*special, *written}}
        self._index = {text: index for index, text in enumerate(self._ids)}
        self._special, self._shown = _any_of(special), _any_of([*special, *written])
        self._secret = secrets.token_hex(8)
        self._unknown = tokenizer.unk_token_id
        self._tokenizer = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        # Tokens may be looked for in the normalised text.
        self._normalizer = None
        if self._tokenizer is not None and any(token.normalized for _, token in tokens if token.content in self._ids):
            self._normalizer = self._tokenizer.normalizer
        self._renamed: Tokenizer | None = None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "ControlTokens":
        """The control tokens of a tokenizer as it is now; computed once for each."""
        state = len(tokenizer), _template_source(tokenizer)
        known = _KNOWN.get(tokenizer)
        if known is None or known[0] != state:
            known = _KNOWN[tokenizer] = state, ControlTokens(tokenizer)
        return known[1]

    def find(self, text: str, shown: bool) -> str | None:
        """The first text of a control token; None if there is none."""
        pattern = self._shown if shown else self._special
        found = pattern.search(text)
        if found is None and self._normalizer is not None:
            found = pattern.search(self._normalizer.normalize_str(text))
        return None if found is None else found[0]

    def hide(self, text: str, shown: bool) -> str:
        """The text with marks in the places of control tokens."""
        return (self._shown if shown else self._special).sub(lambda m: self._mark(self._index[m[0]]), text)

    def encode(self, text: str, where: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text with marks, which become ordinary text; control tokens outside of marks stay tokens.

        add_special_tokens: what the tokenizer adds to every text, such as a begin-of-sequence token

        Raises DataError that begins with `where` if the tokenizer or its chat template cannot keep them apart.
        """
        own = [self._ids[found[0]] for found in self._shown.finditer(text)]
        text = self._shown.sub(lambda m: self._name(self._index[m[0]]), text)
        for token, index in self._index.items():
            text = text.replace(self._mark(index), token)
        encoding = self._copy(where).encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        # The unknown token is not counted: ordinary text may contain it too.
        control = set(self._ids.values()) - {self._unknown}
        added = encoding.special_tokens_mask  # by add_special_tokens
        found = [id for id, by_itself in zip(ids, added, strict=True) if id in control and not by_itself]
        if found != [id for id in own if id != self._unknown] or self._mark_begin in text:
            raise DataError(
                f"{where}: its text contains control tokens of the model, and this tokenizer or its chat template "
                "cannot keep them apart from its own; remove them from the data"
            )
        return ids

    @property
    def _mark_begin(self) -> str:
        return f"\ue000{self._secret}:"

    def _mark(self, index: int) -> str:
        return f"{self._mark_begin}{index}\ue001"

    def _name(self, index: int) -> str:
        return f"\ue002{self._secret}:{index}\ue001"

    def _copy(self, where: str) -> Tokenizer:
        if self._tokenizer is None:
            raise DataError(
                f"{where}: its text contains control tokens of the model, which only a tokenizer with a tokenizer.json "
                "can read as text; convert the tokenizer, or remove them from the data"
            )
        if self._renamed is None:
            tree = json.loads(self._tokenizer.to_str())
            _rename(tree, {text: self._name(index) for text, index in self._index.items()})
            self._renamed = Tokenizer.from_str(json.dumps(tree))
        return self._renamed


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ControlTokens]] = WeakKeyDictionary()


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    """Token ids of a text that the model writes itself, where texts of special tokens are ordinary text.

    Raises DataError as `ControlTokens.encode`.
    """
    control = ControlTokens.of(tokenizer)
    if control.find(text, shown=False) is None:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    return control.encode(control.hide(text, shown=False), where)


def _template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def _is_marker(text: str, template: str) -> bool:
    """Whether the template's source contains it, and it is no word (which may be a name there) and no space."""
    return text in template and re.search(r"[^\w\s]", text) is not None


def _any_of(texts: list[str]) -> re.Pattern[str]:
    """Finds the texts, the longest first, as the tokenizers library does.

    Grouped by how they begin: Python tries alternatives one by one, and there may be a thousand (`<SPECIAL_12>`, …).
    """
    groups: dict[str, list[str]] = {}
    for text in sorted(filter(None, texts), key=len, reverse=True):
        groups.setdefault(text[:3], []).append(text[3:])
    # Long beginnings first: one of fewer letters is a whole text, which may begin others.
    ordered = sorted(groups.items(), key=lambda item: len(item[0]), reverse=True)
    options = [re.escape(begin) + f"(?:{'|'.join(map(re.escape, rests))})" for begin, rests in ordered]
    return re.compile("|".join(options) or "(?!)")


def _rename(tree: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in a tokenizer.json: as added tokens, and in the model's vocabulary, which may hold them too."""
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tree["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    else:  # Unigram
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [[a, b] for a, b in pairs if names.keys().isdisjoint((a, b, a + b))]
    tree["truncation"] = tree["padding"] = None

"""Exact, vectorised detection of stop texts in a stream of tokens."""

import re

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import StoppingCriteria

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte (GPT-2's table), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in printable}
    rest = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """The bytes that each token id contributes in the middle of a text; empty for ids without a token.

    A token that is only part of a character (byte-level BPE, byte fallback) yields its own bytes, not a replacement
    character, so texts outside ASCII are matched too.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    prefix = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[-1]
    head = tokenizer.convert_tokens_to_string([prefix])
    alphabet = _byte_alphabet()
    spellings: list[bytes] = []
    for token in tokens:
        if token is None:
            spellings.append(b"")
            continue
        # Decoded behind another token: decoders strip or add a space at the beginning of a text.
        text = tokenizer.convert_tokens_to_string([prefix, token])[len(head) :]
        if "\ufffd" in text:
            if match := _BYTE_TOKEN.fullmatch(token):
                spellings.append(bytes([int(match[1], 16)]))
                continue
            if all(c in alphabet for c in token):
                spellings.append(bytes(alphabet[c] for c in token))
                continue
        spellings.append(text.encode())
    return spellings


def _byte_automaton(stops: list[bytes]) -> np.ndarray:
    """Aho–Corasick over bytes: `[states + 1, 256]`, the last state absorbing (a stop text has been seen)."""
    edges: list[dict[int, int]] = [{}]
    final = {0: False}
    for stop in stops:
        state = 0
        for byte in stop:
            if byte not in edges[state]:
                edges.append({})
                edges[state][byte] = len(edges) - 1
                final[len(edges) - 1] = False
            state = edges[state][byte]
        final[state] = True
    accept = len(edges)
    delta = np.zeros((accept + 1, 256), dtype=np.int64)
    fallback = [0] * len(edges)
    queue = [0]
    for state in queue:
        for byte in range(256):
            follow = delta[fallback[state], byte] if state else 0
            if byte in edges[state]:
                child = edges[state][byte]
                fallback[child] = int(follow)
                final[child] = final[child] or final[int(follow)]
                queue.append(child)
                delta[state, byte] = child
            else:
                delta[state, byte] = follow
    ends = np.array([final[state] for state in range(accept)] + [True])
    delta = np.where(ends[delta], accept, delta)
    delta[accept] = accept
    return delta


class StopAutomaton:
    """Table `[states, vocabulary]`: the state after a token. The last state means that a stop text has been seen.

    Built once per (tokenizer, stop texts); a step of generation is one gather, on any device, exact at byte level: it
    finds a stop text that spans tokens, that ends inside a token, and that overlaps a failed beginning of itself.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], vocab_size: int) -> None:
        if not stops or any(not stop for stop in stops):
            raise ValueError("stop texts must not be empty")
        delta = _byte_automaton([stop.encode() for stop in stops])
        self.accept = delta.shape[0] - 1
        spellings = token_bytes(tokenizer)[:vocab_size]
        # All tokens advance together, one byte a round, longest tokens last.
        order = sorted(range(len(spellings)), key=lambda i: len(spellings[i]), reverse=True)
        table = np.tile(np.arange(delta.shape[0])[:, None], (1, max(vocab_size, len(spellings))))
        alive = len(order)
        for position in range(max((len(p) for p in spellings), default=0)):
            while alive and len(spellings[order[alive - 1]]) <= position:
                alive -= 1
            ids = np.array(order[:alive])
            table[:, ids] = delta[table[:, ids], np.array([spellings[i][position] for i in ids])[None, :]]
        self.table = torch.from_numpy(table.astype(np.int16 if delta.shape[0] < 2**15 else np.int32))

    def to(self, device: torch.device) -> "StopAutomaton":
        self.table = self.table.to(device)
        return self


class StopTexts(StoppingCriteria):
    """Per row True once a stop text is complete in the generated tokens (never in the prompt) of one `generate` call.

    Expects to be called once per generated token.
    """

    def __init__(self, automaton: StopAutomaton, rows: int) -> None:
        self._automaton = automaton
        self._state = torch.zeros(rows, dtype=torch.long, device=automaton.table.device)
        self._hits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        self._state = self._automaton.table[self._state, input_ids[:, -1]].long()
        self._hits.append(self._state == self._automaton.accept)
        return self._hits[-1]

    def hits(self) -> Tensor:
        """bool `[rows, steps]`: True from the token on that completed a stop text."""
        return torch.stack(self._hits, dim=1)

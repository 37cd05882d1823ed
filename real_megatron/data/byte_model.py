"""A byte-level tokenizer and a tiny random model: any judge file can be tried with them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

PAD, EOS = "<pad>", "<eos>"
BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, whose id is the byte's value; then <pad> and <eos>."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def make_byte_model(directory: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write a Hugging Face checkpoint of a random two-layer Qwen3 model (fp32, about 0.1M parameters) with the byte
    tokenizer; `changes` override fields of its Qwen3Config. Returns the directory."""
    directory = Path(directory)
    tokenizer = byte_tokenizer()
    fields: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(Qwen3Config(**(fields | changes))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _byte_chars() -> list[str]:
    """The printable characters that byte-level tokenizers write bytes as, by byte (GPT-2's table): bytes that are
    visible Latin-1 characters stand for themselves, the others follow from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in visible else next(others)) for byte in range(BYTES)]

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_megatron.data.byte_model import make_byte_model
from real_megatron.scores import ScoreScale


def test_every_byte_is_a_token_and_the_checkpoint_loads(tmp_path: Path) -> None:
    path = make_byte_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "Ünï \t\r\n 🎉[RESULT] 5" + "".join(map(chr, range(256)))
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (256, 257, 258)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.config.model_type == "qwen3" and model.config.eos_token_id == 257
    assert model(torch.tensor([tokenizer.encode("a judge")])).logits.shape == (1, 7, 258)


def test_the_usual_scale_resolves(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_byte_model(tmp_path))
    scale = ScoreScale.resolve(tokenizer, list("12345"), anchor="[RESULT] ")
    assert (scale.anchor_ids, scale.score_ids) == (list(b"[RESULT] "), list(b"12345"))


def test_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (
        load_file(make_byte_model(tmp_path / name, seed, num_hidden_layers=1) / "model.safetensors")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert not any("layers.1." in name for name in first)

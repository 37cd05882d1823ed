"""The tokens at which responses end: what the checkpoint's files and the tokenizer say, together."""

import json
from pathlib import Path

import pytest

from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.errors import CheckpointError
from real_megatron.hf.stop_ids import stop_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, [257]),
        (None, {"model_type": "llama"}, [257]),  # not the 2 that LlamaConfig has by default
        (None, {"eos_token_id": 5}, [5, 257]),
        ({"eos_token_id": [128001, 128008, 128009]}, {"eos_token_id": 128001}, [257, 128001, 128008, 128009]),
        ({"eos_token_id": None}, {"eos_token_id": [3, 257]}, [3, 257]),
    ],
)
def test_all_that_are_named(generation: dict | None, config: dict | None, expected: list[int], tmp_path: Path) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    tokenizer = byte_tokenizer()
    assert stop_ids(tmp_path, tokenizer) == expected
    tokenizer.eos_token = None
    assert set(stop_ids(tmp_path, tokenizer)) >= set(expected) - {257}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is damaged"), ("[]", "is damaged"), ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'")],
)
def test_damaged_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config\.json:? {message}"):
        stop_ids(tmp_path, byte_tokenizer())

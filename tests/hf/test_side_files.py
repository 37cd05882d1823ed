"""What goes with a checkpoint beside its weights: a converted one writes prompts as its source does."""

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer
from transformers import tokenization_utils_base as base

from real_megatron.hf import directory as directory_module
from real_megatron.hf.directory import checkpoint_directory
from real_megatron.hf.identity import model_files
from real_megatron.hf.side_files import carry
from tests.support.rollout_models import byte_level


def test_a_tokenizer_keeps_all_its_chat_templates(tmp_path: Path) -> None:
    """As transformers saves them: the default one as a file, the others in a folder."""
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ messages }}", "judge": "{{ messages | length }}"}
    tokenizer.save_pretrained(tmp_path / "source")
    written = {path.relative_to(tmp_path / "source").as_posix() for path in (tmp_path / "source").rglob("*.*")}
    assert "additional_chat_templates/judge.jinja" in written
    assert set(carry(tmp_path / "source", tmp_path / "target")) == written
    assert AutoTokenizer.from_pretrained(tmp_path / "target").chat_template == tokenizer.chat_template


def test_the_run_goes_along_without_an_alarm_and_is_no_part_of_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As REAL starts from SFT's checkpoint: how that was asked decides nothing about what is trained."""
    for name in ("config.json", "real_megatron.yaml", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with caplog.at_level("INFO"):
        assert carry(tmp_path, tmp_path / "target") == ["config.json", "real_megatron.yaml"]
    assert not caplog.records
    assert set(model_files(tmp_path)) == {"config.json", "model.safetensors"}


def test_every_file_that_a_tokenizer_or_processor_reads_is_downloaded_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are transformers' own, and those that it writes in the code: of the legacy processors, of Mistral."""
    names = {base.ADDED_TOKENS_FILE, base.SPECIAL_TOKENS_MAP_FILE, base.TOKENIZER_CONFIG_FILE, base.CHAT_TEMPLATE_FILE}
    for kind in (LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer, T5Tokenizer):
        names |= set(kind.vocab_files_names.values())
    names |= {"tokenizer.4.0.0.json", "tokenizer.model.v3", "tiktoken.model", "tekken.json"}
    names |= {"chat_template.json", f"{base.CHAT_TEMPLATE_DIR}/judge.jinja"}
    names |= {"preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"}
    names |= {"real_megatron.yaml"}
    source = tmp_path / "source"
    (source / base.CHAT_TEMPLATE_DIR).mkdir(parents=True)
    for name in [*names, "config.json", "generation_config.json", "modeling_own.py", "pytorch_model.bin"]:
        (source / name).write_text(name)
    assert set(carry(source, tmp_path / "target")) == names | {"config.json", "generation_config.json"}
    assert all((tmp_path / "target" / name).read_text() == name for name in names)

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], **_: object) -> str:
        kept = set(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert kept == names
        return str(source)

    monkeypatch.setattr(directory_module, "snapshot_download", snapshot_download)
    checkpoint_directory("owner/name")

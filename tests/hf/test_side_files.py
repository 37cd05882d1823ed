"""What goes with a checkpoint beside its weights: a converted one writes prompts as its source does."""

from pathlib import Path

from transformers import AutoTokenizer

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

"""The command line where neither the terminal nor the locale knows UTF-8, and files that are UTF-8 all the same."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.evaluation.test_report import make

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for top in ("real_megatron", "tools", "benchmarks", "examples") for path in (ROOT / top).rglob("*.py")
)
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "TERM": "dumb"}
# One process for all, as a whole import costs seconds: runs each line of its input as a command.
COMMANDS = """
import json, os, sys
from real_megatron import cli
for line in sys.stdin:
    sys.argv = ["real-megatron", *(os.fsdecode(word.encode()) for word in json.loads(line))]
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"{sys.argv}: {end.code}")
from real_megatron.config import DataSource
from real_megatron.data import load_examples
(example,) = load_examples(DataSource(path="data.jsonl"))
assert example.messages[-1]["content"] == "\\u00dcber \\u2192", ascii(example)
"""


def test_every_command_prints_and_reads_without_utf8(tmp_path: Path) -> None:
    """Also where a directory's name is not ASCII, so that its bytes are none of the locale's characters."""
    run = tmp_path / "läufe"
    make("→", 0.5, 20).save(run / "evaluation/→.json")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n", encoding="utf-8")
    (tmp_path / "data.jsonl").write_text('{"prompt": "Über →", "label": 4}\n', encoding="utf-8")
    model = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    model |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model |= {"head_dim": 8, "tie_word_embeddings": False, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(model), encoding="utf-8")
    names = ["train", "sft", "critiques", "evaluate", "judge", "report", "convert"]
    commands = [["--help"], *([name, "--help"] for name in names)]
    commands += [["convert", name, "--help"] for name in ("to-megatron", "to-hf")]
    commands += [["convert", "to-megatron", str(tmp_path), "--dry-run"], ["report", str(run), "--title", "Über →"]]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="".join(json.dumps(command) + "\n" for command in commands).encode(),
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | ASCII | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.isascii() and b"Hugging Face ? Megatron" in done.stdout
    report = (run / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# Über →\n") and "läufe" in report and "## →" in report


def test_text_is_read_and_written_as_utf8() -> None:
    """Without `encoding` Python takes the locale's."""
    found = [(path, call) for path in SOURCES for call in calls(path) if in_the_locales_encoding(call)]
    assert not [f"{path}:{call.lineno}: {ast.unparse(call)}" for path, call in found]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def in_the_locales_encoding(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in given
    if name in ("TemporaryFile", "NamedTemporaryFile"):
        return any(isinstance(a, ast.Constant) and "b" not in str(a.value) for a in call.args)
    if name != "open":
        return False
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    text = not any("b" in mode for mode in modes if len(mode) < 4)
    # open(), Path.open() and Path.open("w"); what else is called open takes other things than a mode.
    return text and (isinstance(call.func, ast.Name) or not call.args or bool(modes))

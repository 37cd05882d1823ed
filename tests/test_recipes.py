"""Every recipe could start: a dry run at its number of GPUs, with its model's configuration and a small data file."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from real_megatron.config import RunConfig
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.hardware import find_gpu
from real_megatron.planning.command import find_layouts
from real_megatron.training import dry_run as module
from real_megatron.training.dry_run import dry_run
from tests.support.layouts import CONFIGS

pytestmark = pytest.mark.usefixtures("no_process_group")
RECIPES = Path(__file__).parents[1] / "examples/recipes"
FIXTURES = {
    "mistral-7b": "Mistral-7B-v0.2",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-32b": "Qwen3-32B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "qwen2.5-72b": "Qwen2.5-72B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
}
# Recipe, its training GPUs, its command: the table of the README.
TABLE = (RECIPES / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| \[([\w.-]+)\]\(\1\) \| (\d+) \|.*\| `(.*)` \|$", TABLE, re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory per model with its config.json and a small tokenizer, and data in the format of the recipes."""
    directory = tmp_path_factory.mktemp("recipes")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(directory / "tokenizer")
    for name, fixture in FIXTURES.items():
        shutil.copytree(directory / "tokenizer", directory / name)
        shutil.copy(CONFIGS / f"{fixture}.json", directory / name / "config.json")
    rows = [
        {"instruction": f"Rate answer {i}: {'good ' * (i % 100)}", "orig_score": str(1 + i % 5), "orig_feedback": "So."}
        for i in range(300)
    ]
    (directory / "data.json").write_text(json.dumps(rows))
    return directory


def test_the_table_has_every_recipe() -> None:
    assert sorted(name for name, _, _ in ROWS) == sorted(path.name for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize(("recipe", "gpus", "command"), ROWS, ids=[name for name, _, _ in ROWS])
def test_a_recipe_could_start(
    recipe: str, gpus: str, command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RECIPES / recipe
    text = " ".join(path.read_text(encoding="utf-8").replace("\\\n#", "").split())
    assert command.replace("CONFIG", f"examples/recipes/{recipe}") in text
    asked: list[str] = []
    monkeypatch.setattr(module, "silent_servers", lambda urls, _: asked.extend(urls) or {})
    stem, _, kind = path.stem.rpartition("-")
    changes = [f"model.path={place / stem}", f"output={tmp_path}", f"data.train.0.path={place}/data.json"]
    changes += ["epochs=null", "steps=2343"]  # those of the recipe's own data
    if kind == "real":
        changes += [f"data.eval.feedback_bench.path={place}/data.json", f"rollout.python={sys.executable}"]
    config = RunConfig.from_yaml(path, changes)
    found = dry_run(config, "train" if kind == "real" else "sft", int(gpus), find_gpu("H100"))
    assert not list(tmp_path.iterdir())
    expected = ("holds no weights", "are free: choose another file system")
    assert not [warning for warning in found.warnings if not any(part in warning for part in expected)]
    nodes = re.search(r"--nodes=(\d+)", command)
    serving = len(config.rollout.servers) * config.rollout.tensor
    assert len(asked) == len(config.rollout.servers)
    if nodes is not None:
        rollout = re.search(r"ROLLOUT_NODES=(\d+)", command)
        assert (int(nodes[1]), serving) == (int(gpus) // 8 + serving // 8, 8 * int(rollout[1] if rollout else 1))
    else:
        assert f"--nproc-per-node {gpus} " in command


SMALLER = [name for name, _, _ in ROWS if name.startswith(("mistral-7b", "qwen3-8b", "qwen3-32b"))]


@pytest.mark.parametrize("recipe", SMALLER)
def test_layouts_are_the_first_that_the_plan_finds(recipe: str, place: Path) -> None:
    """Of the smaller models: the search takes longer for the others. After a change of the estimates, run the plan of
    every recipe again (README.md there)."""
    config, (stem, _, kind) = RunConfig.from_yaml(RECIPES / recipe), recipe.removesuffix(".yaml").rpartition("-")
    (gpus,) = (int(gpus) for name, gpus, _ in ROWS if name == recipe)
    serving = (len(config.rollout.servers) or config.rollout.replicas) * config.rollout.tensor if kind == "real" else 0
    placement = "separate" if serving else "none"
    found = find_layouts(config, str(place / stem), gpus + serving, find_gpu("H100"), placement)
    layout, workload = found.best[0].layout, found.best[0].workload
    assert (layout.world, layout.parallel) == (gpus, config.parallel)
    assert (layout.model.recompute, workload.max_tokens) == (config.model.recompute, config.batch.max_tokens)

"""The search over layouts, its table, its settings and the command."""

import io
from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from real_megatron.cli import app
from real_megatron.config import ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from real_megatron.errors import ConfigError
from real_megatron.hardware import GPUS, find_gpu
from real_megatron.planning.command import find_layouts
from real_megatron.planning.report import candidates_table, layout_text, settings
from real_megatron.planning.search import _parallel_sizes, _States, best_layouts, candidate_memory
from real_megatron.planning.workload import Layout, workload_of
from real_megatron.policy.meta import built_bytes
from real_megatron.policy.model import check_divides
from real_megatron.policy.parallel_groups import check_ranks
from tests.support.layouts import CONFIGS, described

pytestmark = pytest.mark.usefixtures("no_process_group")
H100 = find_gpu("H100")
WORK = workload_of(RunConfig(), prompt_tokens=1000, response_tokens=500)


@pytest.fixture(scope="module")
def found():
    return best_layouts(described("Qwen3-30B-A3B"), 16, H100, WORK)


def test_every_layout_that_is_offered_divides_and_fits(found):
    assert 0 < len(found.best) <= 5 and found.fitting <= found.tried
    assert len({layout_text(one.layout) for one in found.best}) == len(found.best)
    for one in found.best:
        assert one.gpus == 16
        check_ranks(one.layout.parallel, one.layout.world)
        check_divides(one.layout.description, one.layout.parallel)
        # The search looks at the stages alone that can be the fullest: all fit.
        everywhere = candidate_memory(one.layout, one.workload, H100, one.servers)
        assert len(everywhere.stages) == one.layout.parallel.pipeline and everywhere.fits
        assert one.memory.fullest.peak == everywhere.fullest.peak


def test_the_offered_memory_is_that_of_the_model_that_is_built(found):
    one = found.best[0]
    stage = one.memory.fullest.stage
    rank = stage * one.layout.world // one.layout.parallel.pipeline
    built = built_bytes(one.layout.description, one.layout.parallel, one.layout.model, one.layout.world, rank)
    states = one.memory.fullest.states
    assert (states.weights, states.gradients, states.optimizer) == (built.weights, built.gradients, built.optimizer)


def test_faster_ones_come_first(found):
    times = [one.time.total for one in found.best]
    assert all(after > before / 1.10 for before, after in zip(times, times[1:], strict=False))


def test_the_settings_are_a_configuration_that_says_the_same(found):
    one = found.best[0]
    config = RunConfig.from_tree(yaml.safe_load(settings(one, H100)))
    assert config.parallel == one.layout.parallel and config.batch.max_tokens == one.workload.max_tokens
    assert config.model.recompute == one.layout.model.recompute and config.rollout.tensor == one.servers.tensor
    assert candidates_table(found, H100).row_count == len(found.best)


def test_the_settings_undo_what_the_run_has_otherwise(found):
    one = found.best[0]
    changes = ["parallel.pipeline=4", "parallel.virtual_pipeline=3", "parallel.context=2", "model.recompute=full"]
    before = RunConfig.from_yaml(None, changes)
    after = yaml.safe_load(settings(one, H100, before))
    merged = before.model_dump(mode="json")
    for section, values in after.items():
        merged[section] |= values
    assert RunConfig.from_tree(merged).parallel == one.layout.parallel
    # The engine in the trainer would need the whole model on each GPU, which the search has not counted.
    assert before.rollout.engine == "transformers" and after["rollout"]["engine"] == "sglang"


def test_the_settings_name_ranks_and_servers(found):
    one = found.best[0]
    text = settings(one, H100)
    assert text.startswith(f"# {one.layout.world} training ranks: --world {one.layout.world} in a dry run\n")
    assert f"# servers: {one.servers.count} of {one.servers.tensor} GPU" in text and "rollout.servers" in text


def test_what_is_not_searched_is_the_configurations():
    model = described("Qwen3-8B")
    parallel, rollout = ParallelConfig(distributed_optimizer=False), RolloutConfig(keep_weights=False, concurrency=3)
    for placement in ("colocated", "separate"):
        for one in best_layouts(model, 8, GPUS["B200"], WORK, None, placement, 3, rollout, parallel).best:
            assert not one.layout.parallel.distributed_optimizer
            assert (one.servers.keep_weights, one.servers.concurrency) == (False, 3)


def test_a_hybrid_model_counts_no_embedding_as_a_layer():
    for name in ("GPTModel", "HybridModel"):
        model = ModelConfig(megatron_class=name)
        sizes = _parallel_sizes(described("Qwen3-235B-A22B"), 64, H100, WORK, ParallelConfig(), model)
        assert any(one.account_for_embedding for one in sizes) == (name == "GPTModel")


def test_the_table_keeps_words_whole_and_its_phases_add_up(found):
    console = Console(width=100, file=io.StringIO())
    console.print(candidates_table(found, H100))
    text = console.file.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    for word in ("recompute", "s/step", "rollout", "update", "sync", "host", "GPUs", "memory:"):
        assert word in text
    for cells in zip(*(column._cells for column in candidates_table(found, H100).columns[5:10]), strict=True):
        total, *phases = map(float, cells)
        assert total == pytest.approx(sum(phases), abs=0.3)


def test_a_run_without_servers_has_one_response_a_prompt(model_dir):
    supervised = find_layouts(RunConfig(), model_dir, 8, H100, "none", count=1).best[0]
    assert supervised.workload.responses == 1 and supervised.servers is None


def test_colocated_servers_are_those_of_one_node():
    model = described("Qwen3-8B")
    assert all(one.servers.colocated for one in best_layouts(model, 8, H100, WORK, placement="colocated").best)
    stale = RolloutConfig(staleness=1)
    for gpus, rollout in ((16, None), (8, stale)):
        assert not best_layouts(model, gpus, H100, WORK, placement="colocated", rollout=rollout).tried
    for one in best_layouts(model, 16, H100, WORK, placement="separate", rollout=stale).best:
        assert not one.servers.colocated and one.servers.gpus % 8 == 0 and one.layout.world % 8 == 0
    one = best_layouts(model, 8, H100, WORK, placement="separate").best[0]
    rollout = yaml.safe_load(settings(one, H100))["rollout"]
    assert rollout["first_gpu"] == one.layout.world and rollout["replicas"] == one.servers.count
    supervised = best_layouts(model, 8, H100, replace(WORK, generates=False, responses=1))
    assert all(one.servers is None and one.gpus == 8 for one in supervised.best)


def test_a_larger_gpu_fits_more():
    model = described("Qwen3-8B")
    few, more = (best_layouts(model, 4, GPUS[name], WORK, ModelConfig()) for name in ("H100", "H200"))
    assert few.fitting < more.fitting


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / "Qwen3-8B.json").read_text())
    return str(tmp_path)


def test_the_command_shows_the_best_and_writes_the_first(model_dir, tmp_path):
    file = tmp_path / "plans" / "layout.yaml"
    result = run("--model", model_dir, "--gpus", "8", "--top", "2", "--output", str(file), "rollout.n=4")
    assert result.exit_code == 0, result.output
    assert "layouts fit in 79 GiB of H100" in result.output and "Projected, not measured" in result.output
    RunConfig.from_yaml(file)
    again = run("--model", model_dir, "--gpus", "8", "--output", str(file))
    assert again.exit_code == 1 and "exists: name another file, or remove it" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "1"], r"none of .* layouts of .* fits into 79 GiB of H100. The closest \(1 GPU"),
        (["--gpus", "7", "batch.prompts=1", "objective.name=raft"], "--gpus 7: no layout of as many GPUs divides"),
        (["--gpus", "1", "--rollout", "separate"], "trainer and servers need a GPU each"),
        (["--gpus", "16", "--rollout", "colocated"], "on the 8 GPUs of rank 0's node alone: choose separate"),
        (["--gpus", "8", "--rollout", "colocated", "rollout.staleness=1"], "rollout.staleness is 1, with which"),
        (["--gpus", "8", "--rollout", "separate", "objective.name=raft"], "trains without servers: leave --rollout"),
        (["--gpus", "8", "--prompt-tokens", "9000"], "--prompt-tokens 9000: a mean beyond the longest"),
        (["--gpus", "8", "--gpu", "V100"], "GPU 'V100' is not in the table: choose one of A100, H100, H200, B200"),
        (["--gpus", "8", "--rollout", "both"], "--rollout both: choose one of auto, colocated, separate, none"),
        (["--gpus", "8", "data.max_prompt_tokens=50000"], "= 51024: .* has 40960 positions"),
    ],
)
def test_what_cannot_be_planned_is_an_error(model_dir, arguments, message):
    with pytest.raises(ConfigError, match=message):
        overrides = [argument for argument in arguments if "=" in argument]
        named = [argument for argument in arguments if "=" not in argument]
        options = dict(zip(named[::2], named[1::2], strict=True))
        find_layouts(
            RunConfig.from_yaml(None, overrides),
            model_dir,
            int(options["--gpus"]),
            find_gpu(options.get("--gpu", "H100")),
            options.get("--rollout", "auto"),
            int(options["--prompt-tokens"]) if "--prompt-tokens" in options else None,
        )


def test_the_fullest_stage_is_looked_at_where_the_first_has_fewer_layers():
    """A layer of experts is larger than the embedding that counts as one, and 9 × 5 are more layers than 10 × 4."""
    ends = dict(pipeline=10, tensor=2, account_for_embedding=True, account_for_loss=True)
    parallel = ParallelConfig(**ends, sequence_parallel=True)
    layout = Layout(described("Qwen3-30B-A3B"), parallel, ModelConfig(), 20)
    states = _States(layout.description, layout.model).of(parallel, 20)
    seen, whole = (candidate_memory(layout, WORK, H100, None, known) for known in (states, None))
    assert whole.fullest.stage == 1 and seen.fullest == whole.fullest

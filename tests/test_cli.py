"""The command line: help that teaches, errors that say what to fix."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from real_megatron.cli import app, show_error, show_verification
from real_megatron.config import RunConfig
from real_megatron.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    MissingCheckpoint,
    UnsupportedModel,
    UserError,
)
from real_megatron.locks import only_writer

COMMANDS = ["train", "sft", "critiques", "evaluate", "judge", "report", "convert"]


pytestmark = pytest.mark.usefixtures("own_logging")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    text = run("convert", "to-hf", "--help").output if command == "convert" else result.output
    assert "Examples:" in text and f"real-megatron {command}" in text
    assert command in run("--help").output


def test_help_imports_neither_torch_nor_megatron() -> None:
    code = "import sys; import real_megatron.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "absent.yaml: cannot read the configuration"),
        (["train", "RUN", "optimizer.lrr=1"], "unknown key `optimizer.lrr`; did you mean `optimizer.lr`?"),
        (["train", "RUN", "objective.name=raft"], "use `real-megatron sft`"),
        (["sft", "RUN"], "use `real-megatron train`"),
        (["train", "RUN", "model.path="], "model.path is not set"),
        (["train", "RUN", "model.path=", "--dry-run"], "model.path is not set"),
        (["sft", "RUN", "--dry-run"], "use `real-megatron train`"),
        (["train", "RUN", "--world", "4"], "--world and --gpu are what a dry run is to assume: add --dry-run"),
        (["train", "RUN", "--dry-run", "--gpu", "H99"], "GPU 'H99' is not in the table: choose one of A100, H100"),
        (
            ["train", "RUN", "model.path=m", "parallel.tensor=3", "--dry-run", "--world", "8"],
            "= 3 does not divide the 8 ranks of this run",
        ),
        (["train", "RUN", "batch.mini_batches=2"], "set objective.ratio to ppo or truncated_is"),
        (["train", "RUN", "rollout.staleness=1"], "rollout.staleness is 1"),
        (["train", "RUN", "rollout.top_p=0.9"], "rollout.top_p is 0.9: "),
        (["train", "RUN", "objective.reward=nope"], "unknown reward 'nope'; known: "),
        (["evaluate", "RUN"], "data.eval is empty"),
        (["evaluate", "RUN", "data.eval.dev.path=x.jsonl", "--model", "nowhere"], "nowhere: no such directory"),
        (["judge", "--model", "nowhere", "--input", "RUN", "--output", "o.jsonl"], "nowhere: no such directory"),
        (["critiques", "RUN", "--model", "nowhere", "--output", "o.jsonl"], "data.train is empty"),
        (["train", "RUN", "model.path=nowhere"], "nowhere: no such directory"),
        (["train", "RUN", "rollout.engine=x", "model.path=m"], "rollout.engine: unknown engine 'x'"),
        (["train", "RUN", "rollout.engine=no_such:x", "model.path=m"], "module no_such cannot be imported"),
        (["train", "RUN", "model.path=nowhere"], "model.path: nowhere: no such directory"),
        (
            ["train", "RUN", "model.path=MEGATRON"],
            "is a Megatron checkpoint: make a Hugging Face checkpoint of it with",
        ),
        (["judge", "--model", "MEGATRON", "--input", "RUN", "--output", "o.jsonl"], "`real-megatron convert to-hf "),
        (["train", "RUN", "model.path=m", "output=RUN/a/b"], "run.yaml/a/b cannot be a directory, since "),
        (
            ["evaluate", "RUN", "data.eval.dev.path=x.jsonl", "output=RUN/a"],
            "a/evaluation cannot be a directory, since",
        ),
        (["judge", "--model", "m", "--input", "RUN", "--output", "RUN/a/o"], "output: "),
        (
            ["critiques", "RUN", "data.train.0.path=x", "--model", "m", "--output", "RUN/o"],
            "cannot be a directory, since",
        ),
        (["convert", "to-megatron", "m", "RUN/out"], "run.yaml cannot be a directory, since "),
        (["report", "nowhere", "--output", "RUN/out"], "run.yaml/out cannot be a directory, since "),
        (
            ["evaluate", "RUN", "model.path=x"],
            "override `model.path=x`: model.path and model.revision are what training",
        ),
        (["train", "RUN", "model.path=m", "parallel.tensor=3"], "= 3 does not divide the 1 ranks of this run"),
        (
            ["train", "RUN", "model.path=m", "optimizer.warmup_steps=2"],
            "must be less than the run's 2 optimizer updates",
        ),
        (["report", "nowhere"], "nowhere: no such directory"),
        (["convert", "to-megatron", "nowhere"], "name the OUTPUT directory, or add --dry-run"),
        (["convert", "to-megatron", "nowhere", "out"], "nowhere: no such directory"),
        (["convert", "to-hf", "nowhere"], "name the OUTPUT directory, or add --dry-run"),
        (["convert", "to-hf", "step-000100", "--dry-run"], "name the original Hugging Face checkpoint (hf_path, --hf)"),
        (["convert", "to-hf", "nowhere", "out", "--dtype", "fp8"], "--dtype fp8: use one of float32, bfloat16"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("steps: 2\n")
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/.metadata").touch()
    places = {"RUN": str(config), "MEGATRON": str(tmp_path / "megatron")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    result = run(*arguments)
    assert result.exit_code == 1
    errors = capfd.readouterr().err + result.output
    assert message in " ".join(errors.split())
    assert "Traceback" not in errors and errors.count("error:") == 1


@pytest.mark.parametrize("command", ["train", "sft"])
def test_settings_are_checked_before_data_and_model_are_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of the output's own run, its layout, its schedule: hours may lie between."""
    from real_megatron.data.byte_model import make_byte_model

    def loads(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    for place in ("examples.load_examples", "preparation.load_tokenizer", "session.Policy"):
        monkeypatch.setattr(f"real_megatron.training.{place}", loads)
    model, output = make_byte_model(tmp_path / "model"), tmp_path / "runs"
    config = tmp_path / "run.yaml"
    name = "real" if command == "train" else "raft"
    config.write_text(
        f"{{steps: 2, output: {output}, model: {{path: {model}}}, objective: {{name: {name}}}, "
        f"data: {{train: [{{path: {tmp_path / 'absent.jsonl'}}}]}}}}"
    )

    def refused(*overrides: str) -> str:
        result = run(command, str(config), *overrides)
        assert result.exit_code == 1
        return " ".join((capfd.readouterr().err + result.output).split())

    assert "something was loaded" in refused()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "parallel.tensor = 3 does not divide the model's" in refused("parallel.tensor=3")
    assert "layers: choose one of 1, 2" in refused("parallel.pipeline=3", "model.path=" + str(model))
    monkeypatch.delenv("WORLD_SIZE")
    (output / "hf").mkdir(parents=True)
    made = RunConfig.from_yaml(config)
    (output / "hf/real_megatron.yaml").write_text(made.to_yaml())
    assert "something was loaded" in refused()
    message = refused("seed=3", "optimizer.schedule=cosine", "steps=5")
    assert (
        f"{output}/hf belongs to another run: optimizer.schedule: 'constant' in the checkpoint, 'cosine' now" in message
    )
    assert "seed: 0 in the checkpoint, 3 now" in message
    assert "A run can be given more steps where optimizer.schedule is constant" in message
    (output / "hf/real_megatron.yaml").rename(output / "hf/model.safetensors")
    assert f"{output}/hf exists, and no run has made it" in refused()


@pytest.mark.usefixtures("no_process_group")
def test_a_dry_run_prints_its_findings_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its status says that the run could start; under torchrun rank 0 speaks."""
    from real_megatron.data.byte_model import make_byte_model

    model, output = make_byte_model(tmp_path / "model", num_hidden_layers=1), tmp_path / "run"
    (tmp_path / "train.jsonl").write_text('{"prompt": "is it [x]?", "label": 1}\n')
    config = tmp_path / "run.yaml"
    data = f"{{train: [{{path: {tmp_path / 'train.jsonl'}}}]}}"
    config.write_text(f"{{output: {output}, model: {{path: {model}}}, data: {data}, batch: {{max_tokens: 25}}}}")
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        result = run("train", str(config), "--dry-run", "--gpu", "H200", "batch.prompts=2")
        assert result.exit_code == 0
        text = capfd.readouterr().out + result.output
        assert ("train on 4 H200: DP 4" in text) == ("warning: batch.max_tokens is 25: 1 of 1" in text) == printed
    assert not output.exists()


def test_a_file_judged_with_other_settings_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from real_megatron.data.byte_model import make_byte_model

    starts = []

    def build(*_: object) -> None:
        starts.append(1)
        raise EngineError("started")

    monkeypatch.setattr("real_megatron.judging.judge.build_engine", build)
    model = make_byte_model(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    command = ["judge", "--model", str(model), "--input", str(tmp_path / "in.jsonl")]
    command += ["--output", str(tmp_path / "out.jsonl")]
    assert run(*command).exit_code == 1 and len(starts) == 1
    (tmp_path / "out.jsonl").write_text("{}\n")
    result = run(*command, "seed=1")
    assert result.exit_code == 1 and len(starts) == 1
    assert "seed was 0, is 1" in capfd.readouterr().err + result.output


def test_a_bug_is_shown_whole_with_where_to_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("tensor")

    monkeypatch.setattr("real_megatron.training.sft.train", broken)
    (tmp_path / "run.yaml").write_text("objective: {name: raft}\n")
    result = run("sft", str(tmp_path / "run.yaml"))
    text = " ".join((capfd.readouterr().err + result.output).split())
    assert result.exit_code == 1
    assert "Traceback" in text and "KeyError: 'tensor'" in text and "CONTRIBUTING.md, Reporting a bug" in text


@pytest.mark.parametrize("kind", [UserError, EngineError, OSError, FloatingPointError])
def test_an_error_that_explains_itself_is_one_message_with_its_step(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: object) -> None:
        error = kind("what and why")
        error.add_note("at step 3, rank 0")
        raise error

    monkeypatch.setattr("real_megatron.training.sft.train", failing)
    (tmp_path / "run.yaml").write_text("objective: {name: raft}\n")
    result = run("sft", str(tmp_path / "run.yaml"))
    assert result.exit_code == 1
    assert capfd.readouterr().err + result.output == "error: what and why (at step 3, rank 0)\n"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (ConfigError, "first of a node"),
        (DataError, "first of a node"),
        (UnsupportedModel, "first of a node"),
        (MissingCheckpoint, "first of a node"),
        (CheckpointError, "each"),
        (EngineError, "each"),
        (FloatingPointError, "each"),
    ],
)
def test_what_all_ranks_find_is_said_once_a_node(
    kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    spoke = []
    for rank, local in ((0, 0), (1, 1), (2, 0), (3, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        show_error(kind("what and why"))
        spoke.append(f"error on rank {rank}: what and why" in capfd.readouterr().err)
    assert spoke == ([True, False, True, False] if says == "first of a node" else [True] * 4)


def test_a_model_that_cannot_score_ends_the_job_with_one_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows and weights that are NaN: one call of the engine, exit status 1."""
    from safetensors.torch import load_file, save_file

    from real_megatron.data.byte_model import make_byte_model
    from real_megatron.rollout.embedded.engine import TransformersEngine

    weights = make_byte_model(tmp_path / "model", num_hidden_layers=1) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, weights, {"format": "pt"})
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": f"row {i}"}) + "\n" for i in range(64)))
    calls, generate = [], TransformersEngine.generate
    monkeypatch.setattr(
        TransformersEngine, "generate", lambda self, *asked: calls.append(len(asked[0])) or generate(self, *asked)
    )
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    result = run("judge", "--model", str(tmp_path / "model"), *files, "data.max_response_tokens=4")
    errors = capfd.readouterr().err + result.output
    assert result.exit_code == 1 and calls == [64]
    assert (
        errors.count("error:") == 1
        and "log-probabilities that are not finite for prompt 0: its weights" in errors
        and "Traceback" not in errors
    )


def test_judging_under_torchrun_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each rank would write the same output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    output = tmp_path / "o.jsonl"
    result = run("judge", "--model", "m", "--input", "i.jsonl", "--output", str(output))
    assert result.exit_code == 1 and not output.exists()
    assert "judge runs as one process" in capfd.readouterr().err + result.output


def test_an_output_that_another_job_writes_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "i.jsonl", tmp_path / "o.jsonl"
    source.write_text('{"prompt": "a"}\n')
    files = ["--model", "nowhere", "--input", str(source), "--output", str(output)]
    with only_writer(output):
        result = run("judge", *files)
    assert result.exit_code == 1
    errors = " ".join((capfd.readouterr().err + result.output).split())
    assert errors.count("error:") == 1 and "o.jsonl is being written by another job (process" in errors
    result = run("judge", *files, "--keep-fields", "id, score")
    assert result.exit_code == 1
    assert "keep_fields: 'score' is a field of the output row itself" in capfd.readouterr().err + result.output
    assert [path.name for path in tmp_path.iterdir()] == ["i.jsonl"]


def test_two_runs_of_one_name_can_be_compared(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place / "real").mkdir(parents=True)
        (tmp_path / place / "real/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    result = run("report", str(tmp_path / "a/real"), str(tmp_path / "b/real"))
    assert result.exit_code == 0 and (tmp_path / "b/real/report.md").exists()


def test_the_traceback_can_be_asked_for(tmp_path: Path) -> None:
    result = run("--traceback", "train", str(tmp_path / "absent.yaml"))
    assert result.exit_code == 1 and type(result.exception).__name__ == "ConfigError"


def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command with all of its options, and what the function behind it gets."""
    calls: list[tuple[str, tuple, dict]] = []

    def recorded(name: str, result: object) -> None:
        monkeypatch.setattr(name, lambda *of, **options: calls.append((name.rpartition(".")[2], of, options)) or result)

    done = SimpleNamespace(output="o", parameters=1, files=1, seconds=1.0)
    recorded("real_megatron.judging.critiques.write_critiques", 3)
    recorded("real_megatron.judging.evaluate.evaluate", {})
    recorded("real_megatron.bridge.convert_hf_to_megatron", done)
    recorded("real_megatron.bridge.convert_megatron_to_hf", done)
    recorded("real_megatron.hf.directory.checkpoint_directory", Path("there"))
    same = SimpleNamespace(tokens=8, difference=0.0, scale=1.0, passed=True)
    recorded("real_megatron.policy.verify.verify", same)
    (tmp_path / "run.yaml").write_text("steps: 2\n")
    config = RunConfig.from_yaml(tmp_path / "run.yaml", ["seed=3"])
    run_file, cots = str(tmp_path / "run.yaml"), Path("cots.jsonl")

    def called(*arguments: str) -> list[tuple[str, tuple, dict]]:
        calls.clear()
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        for _, _, options in calls:
            options.pop("on_progress", None)
        return list(calls)

    asked = ["--model", "m", "--output", "cots.jsonl", "--samples", "4", "--revision", "v2"]
    expected = ("write_critiques", (config, "m", cots, 4), {"revision": "v2"})
    assert called("critiques", run_file, "seed=3", *asked) == [expected]
    asked = ["--model", "m", "--output", "elsewhere", "--revision", "v2"]
    expected = ("evaluate", (config, "m", Path("elsewhere")), {"revision": "v2"})
    assert called("evaluate", run_file, "seed=3", *asked) == [expected]

    both = ["--dtype", "bfloat16", "--workers", "3", "--family", "my:own", "--revision", "v2", "--verify"]
    sizes = ["--tensor", "2", "--pipeline", "4", "--expert", "8", "--vocab-multiple", "16"]
    shared = {"dtype": torch.bfloat16, "workers": 3, "family": "my:own", "revision": "v2"}
    options = {"tensor": 2, "pipeline": 4, "expert": 8, "vocab_multiple": 16, **shared}
    assert called("convert", "to-megatron", "hub/m", "out", *both, *sizes) == [
        ("convert_hf_to_megatron", ("hub/m", Path("out")), options),
        ("checkpoint_directory", ("hub/m", "v2"), {}),
        ("verify", (Path("there"), Path("out")), {"family": "my:own"}),
    ]
    options = {"hf_path": "hub/m", "max_file_bytes": 2_500_000_000, **shared}
    assert called("convert", "to-hf", "in", "out", *both, "--hf", "hub/m", "--max-file-gb", "2.5") == [
        ("convert_megatron_to_hf", (Path("in"), Path("out")), options),
        ("verify", (Path("out"), Path("in")), {"family": "my:own"}),
    ]


def test_logits_that_differ_end_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(tokens=8, difference=0.5, scale=1.0, passed=False)
    monkeypatch.setattr("real_megatron.policy.verify.verify", lambda *_, **__: other)
    with pytest.raises(CheckpointError, match="out does not compute what hf computes"):
        show_verification(Path("hf"), Path("out"), "auto")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_was_stopped_ends_as_a_shell_reports_it(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from real_megatron.training.stop import Terminated

    def stopped(*_: object) -> None:
        raise Terminated("stopped after step 3", number)

    monkeypatch.setattr("real_megatron.training.rl.train", stopped)
    (tmp_path / "run.yaml").write_text("steps: 9\n")
    assert run("train", str(tmp_path / "run.yaml")).exit_code == status

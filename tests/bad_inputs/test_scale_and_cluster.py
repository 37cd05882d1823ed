"""Bad score scales; ranks, layouts, servers and outputs that cannot work."""

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from real_megatron.locks import only_writer
from tests.support.bad_inputs import JUDGE, RUN, TRAIN, Bad, refuses, set_json, table

HELD = ExitStack()
"""What a row holds while its command runs."""


def given(name: str, override: str, message: str, command: str = TRAIN) -> Bad:
    return Bad(name, message, f"{command} {override}")


@table(
    given("one score", "'scale.scores=[1]'", r"override `scale\.scores=\[1\]`: scale: scores must be two or more"),
    given("a score twice", "'scale.scores=[1, 2, 2]'", r"override .*: scale: scores must be two or more different"),
    given("a range with a dash", "scale.scores=1-5", r"override `scale\.scores=1-5`: scale\.scores: .1-5. is no list and no range: write .*0\.\.100"),
    given("yes and no", "'scale.scores=[yes, no]'", r"override .*: `scale\.scores\.0`: YAML reads it as True, .*in quotes"),
    given("a null score", "'scale.scores=[1, null]'", r"override .*: `scale\.scores\.1`: .*\(got None\)"),
    given("an empty score", "'scale.scores=[1, \"\"]'", r"scale\.scores holds an empty text"),
    given("numbers and words", "'scale.scores=[1, good]'", r"scores \['good'\] are not numbers .*give scale\.values"),
    given("one number in two spellings", "'scale.scores=[\"1\", \"1.0\"]'", r"the score values .*not distinct; .*scale\.values"),
    given("values too few", "'scale.values=[1, 2]'", r"override .*: scale: values has 2 numbers for 5 scores: give one"),
    given("a value twice", "'scale.values=[1, 2, 3, 4, 4]'", r"the score values .*not distinct; .*scale\.values"),
    given("a value that is no number", "'scale.values=[1, 2, 3, 4, .nan]'", r"override .*: `scale\.values\.4`: .*finite number"),
    given("an infinite value", "'scale.values=[1, 2, 3, 4, .inf]'", r"override .*: `scale\.values\.4`: .*finite number"),
    given("a value in words", "'scale.values=[1, 2, 3, 4, x]'", r"override .*: `scale\.values\.4`: .*valid number"),
    given("a list of spellings", "'scale.spellings=[five]'", r"override .*: `scale\.spellings`: must be `key: value` lines"),
    given("a number's spelling", "'scale.spellings={5: five}'", r"override .*: `scale\.spellings.*five"),
    given("spellings of no score", "'scale.spellings={\"6\": [six]}'", r"scale\.spellings names '6', which is no score; give spellings of"),
    given("a spelling of two scores", "'scale.spellings={\"4\": [x], \"5\": [x]}'", r"scale\.spellings: 'x' is given twice; give each text to one score"),
    given("an empty end", "'scale.scores=[1, 5, 10]' 'scale.ends=[\"\"]'", r"scale\.ends: '' is no token of its own behind the score '1': .*name a text"),
    given("an end that continues a score", "'scale.scores=[1, 1.5, 5]' 'scale.ends=[\".\"]'", r"scale\.ends: '\.' begins with .* continues the score '1' to another; leave that end out"),
    given("a text of ends", "scale.ends=eos", r"override .*: `scale\.ends`: must be a list"),
    given("no anchor", "scale.anchor=", r"override .*: `scale\.anchor`: .*at least 1 character"),
    Bad("a blank anchor", r"scale\.anchor: the anchor ' ' has no visible character; give", files={"run.yaml": RUN + "scale: {anchor: ' '}\n"}),
)  # fmt: skip
def test_a_bad_scale_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    refuses(row, base, tmp_path, monkeypatch, capfd)


X = "train run.yaml"
SGLANG = TRAIN + " rollout.engine=sglang "
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}


def ranks(name: str, message: str, command: str = X, **env: str) -> Bad:
    return Bad(name, message, command, env=env, mended=False)


def port_taken() -> None:
    held = HELD.enter_context(socket.socket())
    held.bind(("127.0.0.1", 0))
    held.listen()
    settings = f"rollout: {{engine: sglang, python: python3, port: {held.getsockname()[1]}}}\n"
    Path("run.yaml").write_text(RUN + settings)


@table(
    ranks("a rank without a world", r"RANK is set in the environment, WORLD_SIZE", RANK="0"),
    ranks("a second rank without a world", r"RANK=1 in the environment is not below WORLD_SIZE, which is not set: start", RANK="1"),
    ranks("a rank beyond the world", r"RANK=2 in the environment is not below WORLD_SIZE=2: start", RANK="2", WORLD_SIZE="2"),
    ranks("a rank that is no number", r"RANK='x' in the environment is no number: start", RANK="x", WORLD_SIZE="1"),
    ranks("a world that is no number", r"WORLD_SIZE='-1' in the environment is no number: start", WORLD_SIZE="-1"),
    ranks("nobody to meet", r"RANK is set in the environment, MASTER_ADDR and MASTER_PORT not: start", RANK="0", WORLD_SIZE="2"),
    ranks("a port that is none", r"the ranks cannot meet at MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=x .*every node must reach", RANK="0", WORLD_SIZE="1", **MASTER),
    ranks("tasks of Slurm", r"Slurm has started 4 tasks, but no torchrun: start", SLURM_STEP_NUM_TASKS="4"),
    ranks("tasks of Slurm that evaluate", r"Slurm has started 4 tasks, but no torchrun: start", "evaluate run.yaml --model model data.eval.dev.path=train.jsonl", SLURM_STEP_NUM_TASKS="4"),
    ranks("ranks that judge", r"judge runs as one process: start it without torchrun", JUDGE, WORLD_SIZE="2"),
    given("ranks that do not divide", "parallel.tensor=2 parallel.pipeline=2 --world 6", r"parallel\.tensor × .* = 4 does not divide the 6 ranks .*start a multiple"),
    given("more shards than ranks", "parallel.tensor=2", r"parallel\.tensor × .* = 2 does not divide the 1 ranks"),
    given("shards that do not divide heads", "parallel.tensor=3 --world 3", r"parallel\.tensor = 3 does not divide the model's 4 attention heads: choose one of 1, 2, 4"),
    Bad("shards that do not divide key heads", r"parallel\.tensor = 4 is neither a divisor nor a multiple of the model's 3 key", TRAIN + " parallel.tensor=4 --world 4", make=set_json("model/config.json", num_attention_heads=12, num_key_value_heads=3)),
    given("more stages than layers", "parallel.pipeline=2 --world 2", r"parallel\.pipeline .* = 2 does not divide the model's 1 layers: choose 1"),
    given("experts without experts", "parallel.expert=2 --world 2", r"parallel\.expert = 2: the model has no experts, set it to 1"),
    given("virtual stages without stages", "parallel.virtual_pipeline=2", r"override .*virtual_pipeline splits pipeline ranks: set"),
    given("sequence parallel without tensor", "parallel.sequence_parallel=true", r"override .*sequence_parallel shards .*set tensor"),
    given("a server without http", "'rollout.servers=[localhost:30000]'", r"override .*rollout: servers: 'localhost:30000' is no URL .*write it as http://", SGLANG),
    given("a server of another protocol", "'rollout.servers=[ftp://x:1]'", r"override .*rollout: servers: 'ftp://x:1' is no URL", SGLANG),
    given("a port beyond 65535", "'rollout.servers=[http://x:99999]'", r"override .*rollout: servers: 'http://x:99999' is no URL", SGLANG),
    given("half an address", "'rollout.servers=[\"http://[::1\"]'", r"override .*rollout: servers: 'http://\[::1' is no URL", SGLANG),
    given("a server twice", "'rollout.servers=[http://a:1, http://a:1/]'", r"override .*rollout: servers names a server twice: name", SGLANG),
    given("a router without http", "'rollout.servers=[http://a:1]' rollout.router=b:3", r"override .*rollout: router: 'b:3' is no URL", SGLANG),
    given("a text of servers", "rollout.servers=http://a:1", r"override .*: `rollout\.servers`: must be a list", SGLANG),
    given("servers that nobody asks", "'rollout.servers=[http://a:1]'", r"rollout\.servers are for .*rollout\.engine is transformers: set it"),
    given("an address that servers do not reach", "'rollout.servers=[http://10.0.0.1:1]'", r"rollout\.sync_host is 127\.0\.0\.1, .*set it to the address", SGLANG),
    given("a key that is not exported", "'rollout.servers=[http://127.0.0.1:1]' rollout.api_key_variable=NOPE", r"rollout\.api_key_variable: the environment variable NOPE is not set: export", SGLANG),
    given("a Python that is not there", "rollout.python=nope", r"rollout\.python: nope is not there", SGLANG),
    given("more servers than GPUs", "rollout.python=python3 rollout.replicas=9", r"rollout\.replicas × .* = 9 GPUs .* do not fit into the 8", SGLANG),
    given("an argument of our own", "'rollout.server_args=[--port, 3]'", r"override .*server_args: --port: .*remove it", SGLANG),
    Bad("a port that is taken", r"rollout\.port: port \d+ of 127\.0\.0\.1 is in use .*set rollout\.port", make=port_taken),
    given("an output that cannot be made", "output=/proc/x", r"output: /proc/x cannot be written: /proc: .*; choose another"),
    Bad("two runs of one output", r"out is being written by another job \(process \d+ .*choose another output", X, make=lambda: HELD.enter_context(only_writer(Path("out"), inside=True))),
)  # fmt: skip
def test_a_bad_cluster_is_one_message(
    row: Bad, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    with HELD:
        refuses(row, base, tmp_path, monkeypatch, capfd)

"""The vLLM engine against a real vLLM server on the CPU (tests/run.sh --vllm; CI does not run it).

One server for most of the module, of a model whose output layer is tied to its embedding: the case that a CPU server
gets wrong by itself. Its context is exactly the prompt and the response of the specification and the position that
scoring reserves. Log-probs are compared with transformers in fp32 on the same weights: two implementations of a
two-layer model, so 1e-4 is loose.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote.ports import free_ports
from real_megatron.rollout.vllm import command
from real_megatron.rollout.vllm.engine import VLLMEngine
from real_megatron.scores import Branch
from tests.support import served_policy
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec
from tests.support.served_policy import EOS, PROMPTS, TOKENIZER
from tests.support.served_runs import PROMPTS as TRAINED
from tests.support.served_runs import SAME, SAMPLES, served_config, uneven_task, watched
from tests.support.tiny_runs import rows

pytestmark = pytest.mark.vllm

LONGEST = 64
# The smallest head that vLLM has attention for on a CPU.
CONFIG = tiny_qwen3(
    len(TOKENIZER), eos_token_id=EOS, head_dim=32, max_position_embeddings=2 * LONGEST + command.RESERVED_TOKENS
)
PARAMS = SamplingParams(n=4, temperature=1.0, top_p=0.9, max_new_tokens=24, stop=("e", " t"), watch_ids=(40, 5))


def policy(seed: int):
    return served_policy.policy(CONFIG, seed)


def spec(config: RolloutConfig, model_dir: Path, work_dir: Path, **fields):
    lengths = {"max_prompt_tokens": LONGEST, "max_response_tokens": LONGEST}
    return engine_spec(config, model_dir, work_dir, tokenizer=TOKENIZER, **lengths, **fields)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    policy(0).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def settings(**changes) -> RolloutConfig:
    return RolloutConfig(**({"engine": "vllm", "n": 4, "start_timeout_s": 900} | changes))


@pytest.fixture(scope="module")
def engine(model_dir, vllm_python, tmp_path_factory):
    # So few requests at a time that a batch of 40 prompts is not answered at once.
    config = settings(python=vllm_python, concurrency=8)
    engine = VLLMEngine(spec(config, model_dir, tmp_path_factory.mktemp("work")))
    yield engine
    engine.close()


def worst_difference(groups, model, temperature=1.0, prompts=PROMPTS) -> float:
    return served_policy.worst_difference(groups, model, temperature, prompts, PARAMS.watch_ids)


def test_nothing_is_generated_before_the_first_weights(engine):
    with pytest.raises(EngineError, match="waiting for the next sync"):
        engine.generate(PROMPTS, PARAMS)


def test_served_log_probs_are_the_policys_after_every_sync(engine):
    served_policy.check_syncs(engine, CONFIG, PARAMS)


def test_branches_of_a_response_are_read_behind_whole_texts(engine):
    served_policy.check_branches(engine, CONFIG)


def test_requests_without_the_runs_key_are_refused(engine):
    """Also those that could load other weights, which vLLM itself would take."""
    replica = engine._pool.replicas[0]
    for path in ("/v1/models", "/weight_info", "/server_info"):
        asked = engine._http.get(replica.url + path, 60, anonymous=True)
        assert engine._loop.run(asked).status == 401
    process = replica.process
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert engine.api_key.encode() not in command + process.log.read_bytes()


def test_a_prompts_seed_decides_its_samples(engine):
    params = SamplingParams(n=4, max_new_tokens=16)
    seeds = [7, 7, 8, 9, 10]
    first, again = (engine.generate(PROMPTS, params, seeds) for _ in range(2))
    assert [[r.token_ids for r in group] for group in first] == [[r.token_ids for r in group] for group in again]
    # torch's generator on a CPU takes the lowest 32 bits of a seed.
    one, other = engine.generate([PROMPTS[0]] * 2, params, [1, 2**62 - 9])
    assert len({tuple(r.token_ids) for r in one + other}) == 8


def test_greedy_log_probs_are_at_temperature_one(engine):
    served_policy.check_greedy(engine, CONFIG, PARAMS.watch_ids)


def test_responses_end_as_they_say(engine):
    model = policy(1)
    served_policy.make_end_likely(model, PROMPTS, EOS)
    engine.update_weights(model.named_parameters(), 1)
    groups = engine.generate(PROMPTS, SamplingParams(n=32, max_new_tokens=24, stop=("a", " t")))
    served_policy.check_endings(groups, TOKENIZER, 24)
    assert worst_difference(groups, model) < 1e-4


def test_prompt_and_response_may_fill_the_context(engine):
    served_policy.check_longest(engine, LONGEST, LONGEST)
    assert engine.branch_logprobs([[40 + i % 200 for i in range(2 * LONGEST)]], [Branch((), (5,))]).isfinite().all()


def test_a_cached_prompt_is_not_served_from_old_weights(engine):
    """Above 16 prompts of a whole cache block, which vLLM makes 128 tokens on a CPU, old keys would be used again."""
    prompt = [[20 + (7 * i) % 250 for i in range(2 * LONGEST)]]
    for version in (4, 5):
        model = policy(version)
        engine.update_weights(model.named_parameters(), version)
        for _ in range(2):
            scored = engine.branch_logprobs(prompt, [Branch((), (40, 5))])
            with torch.no_grad():
                exact = model(torch.tensor(prompt)).logits[:, -1].log_softmax(-1)[:, [40, 5]]
            torch.testing.assert_close(scored, exact, atol=1e-4, rtol=0)


def many_prompts() -> tuple[list[list[int]], SamplingParams]:
    prompts = [p + [i % 200 + 20] for i in range(8) for p in PROMPTS]
    return prompts, SamplingParams(n=4, max_new_tokens=60)


def test_an_update_during_requests_leaves_none_of_the_old_weights(engine):
    engine.update_weights(policy(6).named_parameters(), 6)
    prompts, params = many_prompts()
    results = engine.generate_stream(prompts, params)
    found = [next(results)]
    model = policy(7)
    engine.update_weights(model.named_parameters(), 7)
    found += results
    assert sorted(index for index, _ in found) == list(range(len(prompts)))
    new = [(prompts[i], group) for i, group in found if {r.weight_version for r in group} == {7}]
    assert len(new) > len(prompts) // 2
    assert worst_difference([group for _, group in new], model, 1.0, [prompt for prompt, _ in new]) < 1e-4
    assert {r.weight_version for _, group in found for r in group} <= {6, 7}


def test_a_worker_killed_in_mid_batch(engine):
    """The server's model runs in a process of its own. Every response arrives, once, from the current weights."""
    model = policy(13)
    engine.update_weights(model.named_parameters(), 13)
    prompts, params = many_prompts()
    process = engine._pool.replicas[0].process
    starts = process.starts
    results = engine.generate_stream(prompts, params)
    found = [next(results)]
    os.kill(_largest_of_group(process.pid), signal.SIGKILL)
    found += results
    assert process.starts > starts and sorted(index for index, _ in found) == list(range(len(prompts)))
    groups = [group for _, group in sorted(found, key=lambda item: item[0])]
    assert [len(group) for group in groups] == [4] * len(prompts)
    assert worst_difference(groups, model, 1.0, prompts) < 1e-4
    assert {r.weight_version for g in groups for r in g} == {13}


def _largest_of_group(leader: int) -> int:
    """The process with most memory among the leader's descendants."""
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,rss="], capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return max((rss, pid) for pid, group, rss in found if group == leader and pid != leader)[1]


def test_sleeping_servers_come_back_with_the_current_weights(engine):
    model = policy(14)
    engine.update_weights(model.named_parameters(), 14)
    engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        engine.generate(PROMPTS, PARAMS)
    engine.wake()
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4
    engine.sleep()
    model = policy(15)
    engine.update_weights(model.named_parameters(), 15)
    engine.wake()
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4


@pytest.fixture(scope="module")
def other(model_dir, vllm_python, tmp_path_factory):
    """A server that somebody else has started: without development mode."""
    (port,) = free_ports(1)
    served = spec(settings(python=vllm_python), model_dir, tmp_path_factory.mktemp("other"))
    start = command.server_command(served, 0, port, 2 * LONGEST)
    guard = start.arguments.index("--middleware")
    del start.arguments[guard : guard + 2]  # it would ask for a key
    with (tmp_path_factory.mktemp("log") / "log").open("wb") as log:
        process = subprocess.Popen(
            start.arguments,
            env=os.environ | start.environment | {"VLLM_SERVER_DEV_MODE": "0"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()


def test_a_server_without_development_mode_is_one_clear_error(other, model_dir, tmp_path):
    with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1"):
        VLLMEngine(spec(settings(servers=[other]), model_dir, tmp_path))


def test_a_server_whose_log_probs_are_of_another_kind_is_refused(model_dir, vllm_python, tmp_path):
    config = settings(python=vllm_python, server_args=["--logprobs-mode", "processed_logprobs"])
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        VLLMEngine(spec(config, model_dir, tmp_path))


def test_a_training_run_goes_on_behind_a_killed_server(vllm_python, tmp_path):
    """The tiny judge, by the project's own loop: the rollouts' log-probs are those of the policy in every step."""
    task = uneven_task(tmp_path / "task", head_dim=32)
    config = served_config("vllm", task, tmp_path / "run", steps=3, rollout={"python": vllm_python})
    seen = watched(config, tmp_path, 1, -1)
    assert seen["starts"] >= 2
    assert all(seen_at["worst"] < SAME for seen_at in seen["syncs"] + seen["steps"])
    assert [step["versions"] for step in seen["steps"]] == [[0], [1], [2]]
    assert all(step["responses"] == [SAMPLES] * TRAINED for step in seen["steps"])
    assert all(row["mismatch/max"] < SAME for row in rows(config.output)[1:])

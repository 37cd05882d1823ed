"""The SGLang engine against a real SGLang server on the CPU (tests/run.sh --sglang).

One server for the whole module; engines with other settings attach to it. Log-probs are compared with transformers in
fp32 on the same weights: two implementations of a two-layer model, so 1e-4 is loose.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError
from real_megatron.rollout.engine import SamplingParams, WeightSyncError
from real_megatron.rollout.remote.buckets import bucketed
from real_megatron.rollout.remote.http import Reply
from real_megatron.rollout.scoring import sample_scored
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.sglang.tensor_transport import _pickle_by_handle
from real_megatron.scores import Branch, ScoreScale
from tests.support import rollout_ranks, served_policy
from tests.support.ranks import run_ranks
from tests.support.rollout_models import tiny_qwen3
from tests.support.rollout_specs import engine_spec
from tests.support.served_policy import EOS, PROMPTS, TOKENIZER

pytestmark = pytest.mark.sglang

CONFIG = tiny_qwen3(len(TOKENIZER), eos_token_id=EOS)
PARAMS = SamplingParams(n=4, temperature=0.8, top_p=0.9, max_new_tokens=24, stop=("e", " t"), watch_ids=(40, 5))
RECORDED = json.loads((Path(__file__).parent / "recorded_sglang.json").read_text(encoding="utf-8"))


def policy(seed: int):
    return served_policy.policy(CONFIG, seed)


def settings(**changes) -> RolloutConfig:
    fields = {"engine": "sglang", "n": 4, "bucket_mib": 1}
    return RolloutConfig(**(fields | changes))


def build(config: RolloutConfig, model_dir: Path, work_dir: Path, **fields) -> SGLangEngine:
    fields = {"tokenizer": TOKENIZER, "max_prompt_tokens": 64, "max_response_tokens": 64} | fields
    return SGLangEngine(engine_spec(config, model_dir, work_dir, **fields))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    policy(0).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(model_dir, sglang_python, tmp_path_factory):
    # So few requests at a time that a batch of 40 prompts is not answered at once.
    config = settings(python=sglang_python, concurrency=8)
    engine = build(config, model_dir, tmp_path_factory.mktemp("work"))
    yield engine
    engine.close()


@pytest.fixture
def key(engine, monkeypatch):
    """The server's API key, exported as KEY_OF_SERVER."""
    monkeypatch.setenv("KEY_OF_SERVER", engine.api_key)
    return engine.api_key


@pytest.fixture
def attach(engine, model_dir, tmp_path, key):
    engines = []

    def make(serve_loaded=False, max_prompt_tokens=64, **changes):
        config = settings(servers=[url(engine)], api_key_variable="KEY_OF_SERVER", **changes)
        fields = {"serve_loaded": serve_loaded, "max_prompt_tokens": max_prompt_tokens}
        engines.append(build(config, model_dir, tmp_path, **fields))
        return engines[-1]

    yield make
    for attached in engines:
        attached.close()


def url(engine) -> str:
    return engine._pool.replicas[0].url


def post(engine, path: str, body: dict) -> Reply:
    return engine._loop.run(engine._http.post(url(engine) + path, body, 300))


ROUTES = """
    GET /model_info GET /server_info GET /v1/models GET /get_weights_by_name POST /generate POST /v1/completions
    POST /pause_generation POST /continue_generation POST /abort_request POST /flush_cache POST /update_weight_version
    POST /begin_weight_update POST /end_weight_update POST /init_weights_update_group POST /destroy_weights_update_group
    POST /update_weights_from_distributed POST /update_weights_from_tensor POST /update_weights_from_disk
    POST /release_memory_occupation POST /resume_memory_occupation POST /load_lora_adapter
""".split()


def test_who_has_not_the_key_asks_and_changes_nothing(engine):
    for method, path in zip(ROUTES[::2], ROUTES[1::2], strict=True):
        for headers in ({}, {"Authorization": "Bearer another"}):
            request = engine._http._request(method, url(engine) + path, {}, 60, headers)
            assert engine._loop.run(request).status == 401, path
    with pytest.raises(EngineError, match="status 401 .*rollout.api_key_variable"):
        build(settings(servers=[url(engine)]), engine._model_dir, engine._model_dir)


def test_the_key_is_not_to_be_seen(engine, key):
    """SGLang logs its arguments; those that a process was started with, every user can read."""
    process = engine._pool.replicas[0].process
    log = process.log.read_text(errors="replace")
    assert "[API key]" in log and key not in log
    group = [p for p in Path("/proc").glob("[0-9]*") if p.exists() and os.getpgid(int(p.name)) == process.pid]
    assert len(group) > 1 and not any(key.encode() in (p / "cmdline").read_bytes() for p in group)


def worst_difference(groups, model, temperature=PARAMS.temperature, prompts=PROMPTS) -> float:
    return served_policy.worst_difference(groups, model, temperature, prompts, PARAMS.watch_ids)


def test_nothing_is_generated_before_the_first_weights(engine):
    if engine.version is None:
        with pytest.raises(EngineError, match="waiting for the next sync"):
            engine.generate(PROMPTS, PARAMS)


@pytest.mark.parametrize("transport", ["distributed", "tensor", "disk"])
def test_served_log_probs_are_the_policys_after_every_sync(attach, transport):
    served_policy.check_syncs(attach(weight_sync=transport), CONFIG, PARAMS)


def test_responses_end_as_they_say(engine):
    model = policy(1)
    served_policy.make_end_likely(model, PROMPTS, EOS)
    engine.update_weights(model.named_parameters(), 1)
    groups = engine.generate(PROMPTS, SamplingParams(n=32, max_new_tokens=24, stop=("a", " t")))
    served_policy.check_endings(groups, TOKENIZER, 24)
    assert worst_difference(groups, model, 1.0) < 1e-4


def test_a_prompt_is_prefilled_once_for_all_its_samples(engine):
    prompt = [40 + i for i in range(32)]
    post(engine, "/flush_cache", {})
    reply = post(engine, "/generate", engine._generation_body(prompt, PARAMS, None)).json()
    cached = [sample["meta_info"]["cached_tokens"] for sample in reply]
    assert len(cached) == PARAMS.n and min(cached) >= len(prompt) - 1


def test_branches_of_a_response_are_read_behind_whole_texts(engine):
    served_policy.check_branches(engine, CONFIG)


def test_branches_of_a_response_find_it_in_the_cache(engine):
    """One request a response, of which nothing is computed anew but its last token and the branches' own."""
    engine.update_weights(policy(3).named_parameters(), 3)
    prompt = [60 + i for i in range(32)]
    ((response,),) = engine.generate([prompt], SamplingParams(max_new_tokens=16))
    sequence = prompt + response.token_ids
    branches = served_policy.TREE.branches
    replies = post(engine, "/generate", engine._scoring_body(sequence, branches)).json()
    for reply, branch in zip(replies, branches, strict=True):
        assert reply["meta_info"]["prompt_tokens"] == len(sequence) + len(branch.path)
        assert reply["meta_info"]["cached_tokens"] >= len(sequence) - 1


def test_the_longest_prompt_gets_the_longest_response(engine):
    served_policy.check_longest(engine, 64, 64)


def test_greedy_log_probs_are_at_temperature_one(engine):
    served_policy.check_greedy(engine, CONFIG, PARAMS.watch_ids)


def test_scores_in_one_pass(engine):
    """The judge's path: the distribution behind the anchor comes from the server's own log-probs."""
    scale = ScoreScale.resolve(TOKENIZER, ["1", "4", "5"], None, "[RESULT] ")
    model = policy(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    engine.update_weights(model.named_parameters(), 3)
    prompts = [p + scale.anchor_ids[:-1] for p in PROMPTS]
    groups = sample_scored(engine, TOKENIZER, scale, prompts, SamplingParams(n=4, max_new_tokens=8), "force")
    for prompt, group in zip(prompts, groups, strict=True):
        for scored in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + scored.response_ids])).logits[0, -1]
            exact = logits.log_softmax(-1)[scale.score_ids]
            torch.testing.assert_close(torch.tensor(scored.score_logprobs), exact, atol=1e-4, rtol=0)


def test_a_cached_prompt_is_not_served_from_old_weights(engine, attach):
    """The trap is real: without the flush, output log-probs mix old cache and new weights. The engine avoids it."""
    long = [TOKENIZER.encode("It ignores the question; a poor answer. The answer is short")[:40]]
    params = SamplingParams(n=1, temperature=1.0, max_new_tokens=8)
    old, new = policy(4), policy(5)
    engine.update_weights(old.named_parameters(), 4)
    engine.generate(long, params)
    (bucket,) = bucketed(new.named_parameters(), 2**30)
    assert post(engine, "/begin_weight_update", {}).status == 200
    body = {"serialized_named_tensors": [_pickle_by_handle(bucket)], "flush_cache": False}
    assert post(engine, "/update_weights_from_tensor", body).status == 200
    assert post(engine, "/end_weight_update", {}).status == 200
    assert worst_difference(engine.generate(long, params), new, 1.0, long) > 0.01
    for transport in ("distributed", "tensor", "disk"):
        other = attach(weight_sync=transport)
        for model, version in ((old, 1), (new, 2)):
            other.update_weights(model.named_parameters(), version)
            for _ in range(2):
                assert worst_difference(other.generate(long, params), model, 1.0, long) < 1e-4


@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_a_half_failed_sync_is_detected_and_repaired(attach, transport):
    """The server ends the weight update between two buckets and refuses the rest."""
    engine = attach(weight_sync=transport)
    engine.update_weights(policy(6).named_parameters(), 1)
    model = policy(7)
    refused = []

    def stream():
        for i, (name, tensor) in enumerate(model.named_parameters()):
            if i == 3:
                refused.append(post(engine, "/end_weight_update", {}).status)
            yield name, tensor

    engine._config = engine._config.model_copy(update={"bucket_mib": 0})
    engine.update_weights(stream(), 2)
    assert refused == [200]
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4


def test_a_half_failed_sync_without_kept_weights_serves_nothing_until_the_next(attach):
    engine = attach(weight_sync="tensor", keep_weights=False)

    def stream():
        for i, (name, tensor) in enumerate(policy(8).named_parameters()):
            if i == 3:
                post(engine, "/end_weight_update", {})
            yield name, tensor

    engine._config = engine._config.model_copy(update={"bucket_mib": 0})
    with pytest.raises(WeightSyncError, match="no rollout server holds the new weights"):
        engine.update_weights(stream(), 1)
    with pytest.raises(EngineError, match="no rollout server can serve"):
        engine.generate(PROMPTS, PARAMS)
    # The mixture is marked on the server itself, for whoever comes next.
    assert engine._loop.run(engine._control.weight_label(engine._pool.replicas[0])).endswith("-incomplete")
    model = policy(9)
    engine.update_weights(model.named_parameters(), 2)
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4


def test_ranks_of_a_trainer_share_one_server(engine, model_dir, tmp_path):
    """In a gloo world: rank 0 broadcasts over a group beside it, the others follow the export and get the responses."""
    engine.update_weights(policy(11).named_parameters(), 1)
    server = url(engine), engine.api_key
    results = run_ranks(2, rollout_ranks.attached, *server, str(model_dir), str(tmp_path), PROMPTS)
    assert results[0] == results[1]
    model = rollout_ranks.model_of(str(model_dir))
    for prompt, (ids, logprobs) in zip(PROMPTS, results[0], strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        served = torch.tensor(logprobs)
        torch.testing.assert_close(exact.gather(1, torch.tensor(ids)[:, None])[:, 0], served, atol=1e-4, rtol=0)


def test_a_loaded_checkpoint_is_served_as_version_zero(engine, attach, model_dir):
    post(engine, "/update_weights_from_disk", {"model_path": str(model_dir), "weight_version": "default"})
    served = attach(serve_loaded=True)
    groups = served.generate(PROMPTS, PARAMS)
    assert worst_difference(groups, policy(0)) < 1e-4
    assert {r.weight_version for g in groups for r in g} == {0}


def test_refusals_of_the_server_are_errors_at_once(attach):
    engine = attach(serve_loaded=True, max_prompt_tokens=1000)
    with pytest.raises(EngineError, match="refused .*context length"):
        engine.generate([[5] * 200], PARAMS)


def shape(value):
    """Types and keys, without the values."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) else type(value).__name__


def test_recorded_replies_are_still_those_of_the_server(engine):
    """The local servers of the other tests replay these recordings."""
    engine.update_weights(policy(12).named_parameters(), 12)
    recorded = RECORDED["generate"]["body"]
    for _ in range(20):
        reply = post(engine, "/generate", engine._generation_body(PROMPTS[0], PARAMS, None)).json()
        endings = [sample["meta_info"]["finish_reason"] for sample in reply]
        if endings[0].keys() == recorded[0]["meta_info"]["finish_reason"].keys():
            break
    assert shape(reply[0]) == shape(recorded[0])
    (scored,) = post(engine, "/generate", engine._scoring_body(PROMPTS[0], [Branch((), (5, 6, 300))])).json()
    assert shape(scored) == shape(RECORDED["score"]["body"])
    for path in ("/pause_generation", "/begin_weight_update", "/begin_weight_update#twice", "/end_weight_update"):
        reply = post(engine, path.split("#")[0], {"mode": "abort"} if "pause" in path else {})
        assert (reply.status, reply.json()) == (RECORDED[path]["status"], RECORDED[path]["body"])
    for path in ("/end_weight_update#twice", "/update_weights_from_distributed"):
        body = {"names": [], "dtypes": [], "shapes": []} if "distributed" in path else {}
        reply = post(engine, path.split("#")[0], body)
        assert (reply.status, reply.json()) == (RECORDED[path]["status"], RECORDED[path]["body"])
    post(engine, "/continue_generation", {})


def test_killed_in_mid_batch(engine):
    """It restarts the module's server. Every response arrives, once, from the current weights."""
    model = policy(13)
    engine.update_weights(model.named_parameters(), 13)
    prompts = [p + [i % 200 + 20] for i in range(8) for p in PROMPTS]
    params = SamplingParams(n=4, temperature=1.0, max_new_tokens=60)
    process = engine._pool.replicas[0].process
    results = engine.generate_stream(prompts, params)
    found = [next(results)]
    os.killpg(process.pid, signal.SIGKILL)
    found += results
    assert process.starts >= 2 and sorted(index for index, _ in found) == list(range(len(prompts)))
    groups = [group for _, group in sorted(found, key=lambda item: item[0])]
    assert [len(group) for group in groups] == [4] * len(prompts)
    assert worst_difference(groups, model, 1.0, prompts) < 1e-4
    assert {r.weight_version for g in groups for r in g} == {13}
    model = policy(14)
    engine.update_weights(model.named_parameters(), 14)
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4
    engine.sleep()
    engine.wake()
    assert worst_difference(engine.generate(PROMPTS, PARAMS), model) < 1e-4


def test_float32_logits_of_bfloat16_weights(engine, sglang_python, tmp_path, caplog, monkeypatch):
    """A model whose layers add nothing, so that both implementations have the same bfloat16 hidden states."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_qwen3(len(TOKENIZER), initializer_range=3.0)).bfloat16().eval()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    bfloat16 = {"dtype": torch.bfloat16, "serve_loaded": True}
    served = build(settings(python=sglang_python), tmp_path / "model", tmp_path, **bfloat16)
    try:
        groups = served.generate(PROMPTS, PARAMS)
        scored = served.branch_logprobs(PROMPTS, [Branch((), (5, 40))]).double()
        monkeypatch.setenv("KEY_OF_SERVER", served.api_key)
        config = settings(servers=[url(served)], api_key_variable="KEY_OF_SERVER")
        build(config, tmp_path / "model", tmp_path, **bfloat16).close()
    finally:
        served.close()

    def exact(ids: list[int]) -> torch.Tensor:
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double()
        return hidden @ model.lm_head.weight.double().t()

    with torch.no_grad():
        logits = torch.stack([exact(prompt)[-1] for prompt in PROMPTS])
        assert (logits.bfloat16() - logits).abs().max() > 0.1
        # Logits of up to 60, and those divided by T: 32 exact products summed in float32.
        close = {"atol": 5e-5, "rtol": 0}
        torch.testing.assert_close(scored, logits.log_softmax(-1)[:, [5, 40]], **close)
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for response in group:
                ids = response.token_ids
                logprobs = (exact(prompt + ids)[len(prompt) - 1 : -1] / PARAMS.temperature).log_softmax(-1)
                found = torch.tensor(response.logprobs, dtype=torch.float64)
                torch.testing.assert_close(found, logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0], **close)
    assert "rounded" not in caplog.text
    monkeypatch.setenv("KEY_OF_SERVER", engine.api_key)
    config = settings(servers=[url(engine)], api_key_variable="KEY_OF_SERVER")
    build(config, tmp_path / "model", tmp_path, dtype=torch.bfloat16).close()
    assert f"{url(engine)}: logits are rounded" in caplog.text


def test_killed_in_mid_sync(engine):
    """Between two broadcasts. The server comes back with the new weights before it takes a request."""
    process = engine._pool.replicas[0].process
    starts, model = process.starts, policy(15)

    def stream():
        for i, (name, tensor) in enumerate(model.named_parameters()):
            if i == 3:
                os.killpg(process.pid, signal.SIGKILL)
            yield name, tensor

    whole, engine._config = engine._config, engine._config.model_copy(update={"bucket_mib": 0})
    engine.update_weights(stream(), 15)
    engine._config = whole
    assert process.starts > starts
    groups = engine.generate(PROMPTS, PARAMS)
    assert worst_difference(groups, model) < 1e-4
    assert {r.weight_version for g in groups for r in g} == {15}

"""The remote engines' client against local servers that speak SGLang's and vLLM's protocols, fault by fault.

Every response that was asked for arrives once, or one clear error does.
"""

import math
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from real_megatron.config import RolloutConfig
from real_megatron.errors import ConfigError, EngineError, PromptRefused
from real_megatron.rollout.engine import SamplingParams, WeightSyncError
from real_megatron.rollout.remote import client
from real_megatron.rollout.remote.rotary import check_served_rotary
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.vllm import replies as vllm_replies
from real_megatron.rollout.vllm.engine import VLLMEngine
from real_megatron.scores import Branch, ScoreScale, ScoreTree
from tests.support.rollout_fake_server import VOCABULARY, WATCHED, FakeServer, expected_ids, logprob
from tests.support.rollout_models import tiny_qwen3, word_level
from tests.support.rollout_specs import engine_spec

CONFIG = tiny_qwen3(VOCABULARY, max_position_embeddings=64)
PROMPTS = [[i, i + 1, 5] for i in range(1, 30)]
PARAMS = SamplingParams(n=3, max_new_tokens=8)
ENGINES = {"sglang": SGLangEngine, "vllm": VLLMEngine}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_config(CONFIG)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.01)


@pytest.fixture
def make(tmp_path, model, servers):
    """make(servers, flavour, serve_loaded, **rollout settings) -> engine; closed at the end.

    rounded: which servers round their logits; spec: of the engine's specification
    """
    model.save_pretrained(tmp_path / "model")
    engines = []

    def build(count=1, flavour="sglang", serve_loaded=True, rounded=(), spec=None, **settings):
        fakes = servers(count, flavour)
        for fake in fakes:
            fake.model_path = str(tmp_path / "model")
        for index in rounded:
            fakes[index].fp32_logits = False
        settings = {"weight_sync": "disk", "timeout_s": 30} | settings
        config = RolloutConfig(engine=flavour, servers=[fake.url for fake in fakes], **settings)
        fields = {"serve_loaded": serve_loaded} | (spec or {})
        engine = ENGINES[flavour](engine_spec(config, tmp_path / "model", tmp_path / "work", **fields))
        engines.append(engine)
        return engine, fakes

    yield build
    for engine in engines:
        engine.close()


def check(groups, prompts=PROMPTS, n=3):
    assert len(groups) == len(prompts)
    for prompt, group in zip(prompts, groups, strict=True):
        assert [r.token_ids for r in group] == [expected_ids(prompt, k, 6) for k in range(n)]
        assert all(r.logprobs == [logprob(i) for i in r.token_ids] for r in group)


@pytest.fixture(params=["sglang", "vllm"])
def flavour(request):
    return request.param


def test_every_prompt_gets_its_own_responses_in_order(make, flavour):
    engine, fakes = make(2, flavour, concurrency=4)
    check(engine.generate(PROMPTS, PARAMS))
    assert sum(fake.generations for fake in fakes) == len(PROMPTS)


def test_attached_servers_that_round_their_logits_are_named(make, caplog):
    bfloat16 = {"dtype": torch.bfloat16}
    make(1, rounded=[0])
    make(1, spec=bfloat16)
    make(1, rounded=[0], spec=bfloat16 | {"fp32_logits": False})
    assert not caplog.records
    _, fakes = make(3, rounded=[0, 2], spec=bfloat16)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{fakes[0].url}, {fakes[2].url}: logits are rounded")
    assert "--enable-fp32-lm-head" in record.getMessage()


class CutAtTheThird(ScoreScale):
    """An anchor that ends at the third token of even samples of a prompt and is missing in the others."""

    def cut(self, tokenizer, ids):
        return None if ids[0] % 2 else 3


def test_scores_are_sampled_behind_own_and_forced_anchors(make, flavour):
    engine, (fake,) = make(1, flavour)
    scale = CutAtTheThird(["7", "8"], [1.0, 2.0], ScoreTree.of_tokens([7, 8]), [20, 21], "c [RESULT]")
    sampled = sample_trajectories(engine, word_level(), scale, PROMPTS[:4], PARAMS, "force", [5, 6, 7, 8], score=True)
    forced = 0
    for prompt, group in zip(PROMPTS, sampled.trajectories, strict=False):
        for k, t in enumerate(group):
            source = expected_ids(prompt, k, 6)
            assert t.forced_anchor == bool(source[0] % 2)
            forced += t.forced_anchor
            before = source[:5] + [20, 21] if t.forced_anchor else source[:3]
            token = expected_ids(prompt + before, 0, 1) if t.forced_anchor else source[3:4]
            assert t.response_ids == before + token and t.answer_index == len(before) - 1
            assert t.old_logprobs[-1] == np.float32(logprob(token[0])) and t.loss_mask[-1]
    assert 0 < forced < 12 and fake.generations == 4 + forced


def test_single_samples_and_no_prompts(make, flavour):
    engine, _ = make(1, flavour)
    check(engine.generate(PROMPTS, SamplingParams(n=1, max_new_tokens=8)), n=1)
    assert engine.generate([], PARAMS) == []
    assert engine.branch_logprobs([], [Branch((), (1,))]).shape == (0, 1)


def test_a_vllm_server_draws_one_greedy_response_for_all_samples(make):
    """It refuses to draw more of them."""
    engine, _ = make(1, "vllm")
    params = SamplingParams(n=3, temperature=0, max_new_tokens=8, watch_ids=(3,))
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        assert [r.token_ids for r in group] == [expected_ids(prompt, 0, 6)] * 3
        assert group[0] == group[1] == group[2] and group[0].token_ids is not group[1].token_ids


@pytest.mark.parametrize("fault", ["disconnect", "truncate", "error_500", "wrong_k", "short_logprobs", "abort"])
def test_a_fault_is_survived_and_nothing_counts_twice(make, flavour, fault):
    engine, (fake,) = make(1, flavour)
    fake.faults = [fault, None, fault, fault]
    check(engine.generate(PROMPTS, PARAMS))
    assert fake.generations == len(PROMPTS) + 3


@pytest.mark.parametrize("fault", ["nan", "stale"])
def test_sglang_faults_in_content_are_survived(make, fault):
    engine, (fake,) = make(1)
    fake.faults = [None, fault]
    check(engine.generate(PROMPTS, PARAMS))


def test_a_hanging_request_is_given_up_at_its_deadline_and_repeated(make):
    engine, (fake,) = make(1, timeout_s=1, attempts=10)
    fake.faults = ["hang"]
    check(engine.generate(PROMPTS[:3], PARAMS), PROMPTS[:3])
    assert fake.generations >= 4


def test_the_last_failed_attempt_is_one_error_that_names_prompt_and_cause(make, flavour):
    engine, (fake,) = make(1, flavour, attempts=2)
    fake.faults = ["truncate"] * 1000
    with pytest.raises(EngineError, match=r"generation for prompt \d+ failed 2 times: .*not JSON"):
        engine.generate(PROMPTS, PARAMS)
    fake.faults = []
    check(engine.generate(PROMPTS, PARAMS))


def test_a_refusal_is_not_repeated(make, flavour):
    engine, (fake,) = make(1, flavour)
    fake.faults = ["refuse_400"]
    with pytest.raises(EngineError, match="refused .* status 400: .*longer than the model's context"):
        engine.generate([[1, 2]], PARAMS)
    assert fake.generations == 1


def until_under_way(fake: FakeServer, requests: int) -> None:
    """Wait until so many requests have come to a server."""
    deadline = time.monotonic() + 60
    while fake.generations < requests:
        assert time.monotonic() < deadline, f"{fake.generations} of {requests} requests"
        time.sleep(0.01)


def test_requests_in_flight_are_bounded_and_those_that_wait_keep_none_from_the_other(make):
    """Three requests wait at one server until the other has answered all the rest."""
    engine, (waiting, other) = make(2, concurrency=3, timeout_s=600)
    go_on = threading.Event()
    waiting.faults = [go_on] * 3
    groups = {}
    for index, group in engine.generate_stream(PROMPTS, PARAMS):
        groups[index] = group
        if len(groups) == len(PROMPTS) - 3:
            until_under_way(waiting, 3)
            assert waiting.generations == 3 and other.generations == len(PROMPTS) - 3
            go_on.set()
    check([groups[index] for index in range(len(PROMPTS))])
    assert waiting.most_in_flight == 3 and other.most_in_flight <= 3


def test_a_server_that_goes_away_leaves_its_work_to_the_other(make):
    engine, (first, second) = make(2, concurrency=4, timeout_s=600, start_timeout_s=0.5, restarts=0)
    never = threading.Event()
    first.faults = [never] * 1000
    groups = {}
    for index, group in engine.generate_stream(PROMPTS, PARAMS):
        if not groups:
            until_under_way(first, 4)
            first.__exit__()
        groups[index] = group
    never.set()
    check([groups[index] for index in range(len(PROMPTS))])
    check(engine.generate(PROMPTS, PARAMS))


def test_no_server_left_is_one_clear_error(make):
    engine, (fake,) = make(1, start_timeout_s=0.2, restarts=0)
    fake.__exit__()
    with pytest.raises(EngineError, match="no rollout server can serve: .*is dead"):
        engine.generate(PROMPTS, PARAMS)
    with pytest.raises(EngineError, match="is dead"):
        engine.health()


def test_unreachable_servers_are_named_at_once(tmp_path, model):
    model.save_pretrained(tmp_path)
    config = RolloutConfig(engine="sglang", servers=["http://127.0.0.1:9"], start_timeout_s=0.1, restarts=0)
    with pytest.raises(EngineError, match="http://127.0.0.1:9 .*is it running"):
        SGLangEngine(engine_spec(config, tmp_path, tmp_path))


def test_out_of_range_requests_never_leave(make, flavour):
    """An id beyond the vocabulary ends a real server."""
    engine, (fake,) = make(1, flavour)
    for bad, index, message in (
        ([[1], [VOCABULARY]], 1, "the sequence has the token id 100, outside the vocabulary of 100"),
        ([[-1]], 0, "id -1, outside the vocabulary"),
        ([[]], 0, "the sequence is empty"),
        ([[1], [1], [1] * 41], 2, "the sequence has 41 tokens; with 8 new ones it exceeds the 48"),
    ):
        with pytest.raises(PromptRefused, match=message) as refused:
            engine.generate(bad, PARAMS)
        assert refused.value.index == index
    with pytest.raises(PromptRefused, match="49 tokens; with 0 new ones") as refused:
        engine.branch_logprobs([[1], [1] * 49], [Branch((), (1,))])
    assert refused.value.index == 1
    with pytest.raises(ValueError, match="2 prompts, but 1 seeds"):
        engine.generate([[1], [2]], PARAMS, [1])
    with pytest.raises(ValueError, match="vocabulary"):
        engine.branch_logprobs([[1]], [Branch((), (VOCABULARY,))])
    assert fake.generations == 0


def test_a_server_takes_no_sequence_whose_frequencies_depend_on_others(make, flavour, tmp_path):
    """With longrope those beyond 20 tokens here. A vLLM server that is sized for more has other frequencies for all."""
    half = CONFIG.head_dim // 2
    rope = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    longrope = tiny_qwen3(VOCABULARY, rope_parameters=rope | {"original_max_position_embeddings": 20})
    longrope.save_pretrained(tmp_path / "model")
    engine, _ = make(1, flavour)
    longest = {"sglang": 18, "vllm": 19}[flavour]
    engine.branch_logprobs([[1] * longest], [Branch((), (1,))])
    with pytest.raises(PromptRefused, match=f"{longest + 1} tokens; with 0 new ones it exceeds the {longest} "):
        engine.branch_logprobs([[1] * (longest + 1)], [Branch((), (1,))])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
LONGROPE |= {"original_max_position_embeddings": 20}


@pytest.mark.parametrize(
    ("rope", "sglang", "vllm"),
    [
        # Beside each setting the keys that a server reads otherwise, as measured (see rollout/remote/rotary.py).
        (YARN, "", ""),
        (YARN | {"mscale": 1.5, "mscale_all_dim": 0.5}, "", ""),
        (YARN | {"attention_factor": 0.7}, "attention_factor", ""),
        (YARN | {"attention_factor": 0.1 * math.log(4.0) + 1.0}, "", ""),  # what it is without the key
        (YARN | {"attn_factor": 0.5}, "attn_factor", ""),
        (LONGROPE, "", ""),
        (LONGROPE | {"attention_factor": 1.3}, "attention_factor", "attention_factor"),
        (LONGROPE | {"factor": 2.0}, "factor", "factor"),
        ({"rope_type": "dynamic", "factor": 4.0}, "factor", ""),
        ({"rope_type": "dynamic", "factor": 1.0}, "", ""),
        ({"rope_type": "dynamic", "factor": 1.0, "alpha": 3.0}, "alpha", "alpha"),
        ({"rope_type": "linear", "factor": 4.0}, "", ""),
        ({"rope_type": "default"}, "", ""),
    ],
)
def test_a_server_with_another_rotary_embedding_is_not_asked(rope, sglang, vllm):
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)
    for engine, keys in (("sglang", sglang), ("vllm", vllm)):
        if not keys:
            check_served_rotary(engine, config)
            continue
        right = "transformers or vllm" if not vllm else "transformers"
        with pytest.raises(EngineError, match=f"^config.json: .*{engine} servers read {keys} .*engine to {right}$"):
            check_served_rotary(engine, config)


def test_the_rotary_embedding_is_checked_before_anything_is_asked(tmp_path):
    mixtral = MixtralConfig(num_attention_heads=2, head_dim=32, rope_parameters=YARN | {"rope_theta": 1e6})
    mixtral.save_pretrained(tmp_path / "mixtral")
    config = RolloutConfig(engine="sglang", servers=["http://127.0.0.1:9"], start_timeout_s=0.1, restarts=0)
    with pytest.raises(EngineError, match="mixtral/config.json: .*rope_type 'yarn' .*to transformers or vllm"):
        SGLangEngine(engine_spec(config, tmp_path / "mixtral", tmp_path))


def test_scores_are_read_in_the_order_asked_for(make, flavour):
    engine, fakes = make(2, flavour)
    scored = engine.branch_logprobs(PROMPTS, [Branch((), (7, 3, 50))])
    torch.testing.assert_close(scored, torch.tensor([[WATCHED - 7, WATCHED - 3, WATCHED - 50]]).expand(len(PROMPTS), 3))
    tree = [Branch((), (7, 3)), Branch((5,), (3,)), Branch((6,), (50, 7)), Branch((6, 7), (9,))]
    values = [WATCHED - 7, WATCHED - 3, WATCHED - 1005 - 3, WATCHED - 1006 - 50, WATCHED - 1006 - 7, WATCHED - 2007 - 9]
    requests = sum(fake.generations for fake in fakes)
    scored = engine.branch_logprobs(PROMPTS, tree)
    torch.testing.assert_close(scored, torch.tensor([values]).expand(len(PROMPTS), 6))
    assert sum(fake.generations for fake in fakes) == requests + len(PROMPTS)  # one request for all branches
    watched = engine.generate(PROMPTS[:2], SamplingParams(n=2, max_new_tokens=8, watch_ids=(9, 4)))[1][1].watched
    assert watched == [[WATCHED - 9, WATCHED - 4]] * 6


def test_a_stream_yields_each_prompt_once_as_it_finishes(make):
    engine, (fake,) = make(1, concurrency=2)
    fake.faults = [0.5]
    order = []
    for index, group in engine.generate_stream(PROMPTS, PARAMS):
        assert [r.token_ids for r in group] == [expected_ids(PROMPTS[index], k, 6) for k in range(3)]
        order.append(index)
    assert sorted(order) == list(range(len(PROMPTS))) and order != sorted(order)
    stream = engine.generate_stream(PROMPTS, PARAMS)
    next(stream)
    stream.close()
    check(engine.generate(PROMPTS, PARAMS))


def test_a_router_takes_the_requests_and_the_servers_the_control(make, servers):
    (router,) = servers(1)
    router.version = "default"
    engine, fakes = make(2, router=router.url)
    check(engine.generate(PROMPTS, PARAMS))
    assert router.generations == len(PROMPTS) and not any(fake.generations for fake in fakes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_path": "/another/model"}, "serves /another/model, asked for is .*/model: start it with that path"),
        ({"version": "0a1b2c3d-12"}, r"holds weights of a training run \(0a1b2c3d-12\): restart it"),
        ({"version": "0a1b2c3d-12-incomplete"}, "holds weights of a training run"),
    ],
)
def test_an_attached_server_with_other_weights_than_asked_for_is_refused(make, servers, flavour, changed, message):
    """To evaluate or judge: what it serves would pass for the checkpoint that was named."""
    engine, (fake,) = make(1, flavour)
    for name, value in changed.items():
        setattr(fake, name, value)
    with pytest.raises(EngineError, match=message):
        config = engine._config.model_copy(update={"restarts": 0})
        type(engine)(engine_spec(config, engine._model_dir, engine._model_dir.parent, serve_loaded=True))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_nothing_is_generated_before_the_first_weights(make, flavour):
    engine, _ = make(1, flavour, serve_loaded=False)
    with pytest.raises(EngineError, match="waiting for the next sync"):
        engine.generate(PROMPTS, PARAMS)


def test_weights_reach_every_server_under_one_label(make, flavour, model):
    engine, fakes = make(2, flavour, serve_loaded=False)
    for version in (3, 4):
        engine.update_weights(model.named_parameters(), version)
        assert len({fake.version for fake in fakes}) == 1 and fakes[0].version.endswith(f"-{version}")
        assert len({fake.loaded for fake in fakes}) == 1
        assert not any(fake.paused for fake in fakes)
        groups = engine.generate(PROMPTS, PARAMS)
        check(groups)
        assert {r.weight_version for g in groups for r in g} == {version}


def test_labels_mark_a_mixture_before_the_first_byte_changes(make, flavour, model):
    engine, (fake,) = make(1, flavour, serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    labels = [body["new_version"] for path, body in fake.calls if path == "/update_weight_version"]
    assert labels == [f"{labels[-1]}-incomplete", labels[-1]]
    paths = [path for path, _ in fake.calls]
    load = paths.index("/update_weights_from_disk" if flavour == "sglang" else "/collective_rpc")
    first, last = paths.index("/update_weight_version"), len(paths) - paths[::-1].index("/update_weight_version") - 1
    flush = paths.index("/flush_cache" if flavour == "sglang" else "/reset_prefix_cache")
    assert first < load < flush < last, "what is cached of the old weights goes before the new label"


def test_a_server_that_refuses_the_weights_is_brought_up_to_date(make, flavour, model):
    engine, (good, bad) = make(2, flavour, serve_loaded=False)
    bad.control_faults = {"/update_weights_from_disk" if flavour == "sglang" else "/collective_rpc": [500]}
    engine.update_weights(model.named_parameters(), 1)
    check(engine.generate(PROMPTS, PARAMS))
    engine._loop.run(engine._pool.settled())
    assert bad.version == good.version and bad.loaded == good.loaded
    before = bad.generations
    check(engine.generate(PROMPTS * 3, PARAMS), PROMPTS * 3)
    assert bad.generations > before


def test_a_server_that_hangs_in_a_sync_is_left_behind_and_brought_up_to_date(make, flavour, model):
    engine, (good, bad) = make(
        2, flavour, serve_loaded=False, sync_timeout_s=3, weight_sync="tensor" if flavour == "sglang" else "disk"
    )
    bad.control_faults = {"/begin_weight_update" if flavour == "sglang" else "/collective_rpc": ["hang"]}
    engine.update_weights(model.named_parameters(), 1)
    check(engine.generate(PROMPTS, PARAMS))
    engine._loop.run(engine._pool.settled())
    assert bad.version == good.version and bad.version.endswith("-1") and not bad.paused and not bad.session_open
    assert bad.hangs_waited_for == 0


def test_a_server_that_joins_no_group_is_an_error_not_a_hang(make, model):
    """The trainer's end waits for all members: it gives up as soon as one refuses."""
    engine, (fake,) = make(1, serve_loaded=False, weight_sync="distributed", sync_timeout_s=5, restarts=0)
    with pytest.raises(WeightSyncError, match="this server joins no group"):
        engine.update_weights(model.named_parameters(), 1)
    assert not any(path == "/update_weights_from_distributed" for path, _ in fake.calls)


def test_an_address_that_is_not_this_hosts_is_named(make, model):
    engine, _ = make(1, serve_loaded=False, weight_sync="distributed", sync_host="192.0.2.1")
    with pytest.raises(WeightSyncError, match="192.0.2.1.*rollout.sync_host"):
        engine.update_weights(model.named_parameters(), 1)


def test_a_server_with_old_weights_is_noticed_and_brought_up_to_date(make, flavour, model):
    """As after a restart by somebody else: the label is not the current one."""
    engine, (fake,) = make(1, flavour, serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    label = fake.version
    fake.version, fake.loaded = "default", None
    check(engine.generate(PROMPTS, PARAMS))
    assert fake.version == label and fake.loaded is not None


def test_no_server_with_the_new_weights_is_an_error_until_the_next_sync(make, flavour, model):
    engine, (fake,) = make(1, flavour, serve_loaded=False, restarts=1)
    path = "/update_weights_from_disk" if flavour == "sglang" else "/collective_rpc"
    fake.control_faults = {path: [500] * 100}
    with pytest.raises(WeightSyncError, match="no rollout server holds the new weights"):
        engine.update_weights(model.named_parameters(), 1)
    with pytest.raises(EngineError, match="no rollout server can serve: .*is dead"):
        engine.generate(PROMPTS, PARAMS)


def test_a_stream_of_the_wrong_tensors_is_refused_and_consumed(make, flavour, model):
    engine, _ = make(1, flavour, serve_loaded=False)
    consumed = []

    def stream():
        for name, tensor in model.named_parameters():
            consumed.append(name)
            if name != "model.norm.weight":
                yield name, tensor

    with pytest.raises(EngineError, match="1 missing: model.norm.weight"):
        engine.update_weights(stream(), 1)
    assert len(consumed) == len(list(model.named_parameters()))
    with pytest.raises(EngineError, match="no rollout server can serve: .*is stale"):
        engine.generate(PROMPTS, PARAMS)
    engine.update_weights(model.named_parameters(), 2)
    check(engine.generate(PROMPTS, PARAMS))
    # After good weights, too: a server that still has them must not serve them as the current ones.
    with pytest.raises(EngineError, match="1 missing: model.norm.weight"):
        engine.update_weights(stream(), 3)
    engine._loop.run(recovered(engine))
    with pytest.raises(EngineError, match="no rollout server can serve: .*is stale"):
        engine.generate(PROMPTS, PARAMS)


async def recovered(engine):
    """As after a health check that was missed."""
    for replica in engine._pool.replicas:
        engine._pool.recover(replica, "on demand")
    await engine._pool.settled()


def test_a_full_disk_is_an_error_until_the_next_sync(make, flavour, model):
    engine, (fake,) = make(1, flavour, serve_loaded=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    consumed = []

    def stream():
        for name, tensor in model.named_parameters():
            consumed.append(name)
            yield name, tensor

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
        with pytest.raises(WeightSyncError, match="no space left for .*free space there"):
            engine.update_weights(stream(), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    # The other ranks are not left in the export, and the server knows nothing of it.
    assert len(consumed) == len(list(model.named_parameters())) and fake.loaded is None
    with pytest.raises(EngineError, match="no rollout server can serve: .*is stale"):
        engine.generate(PROMPTS, PARAMS)
    engine.update_weights(model.named_parameters(), 2)
    check(engine.generate(PROMPTS, PARAMS))


def test_an_export_that_breaks_leaves_the_engine_without_weights(make, flavour, model):
    engine, _ = make(1, flavour, serve_loaded=False)

    def broken():
        yield next(iter(model.named_parameters()))
        raise RuntimeError("export failed")

    with pytest.raises(RuntimeError, match="export failed"):
        engine.update_weights(broken(), 1)
    with pytest.raises(EngineError, match="no rollout server can serve: .*is stale"):
        engine.generate(PROMPTS, PARAMS)
    engine.update_weights(model.named_parameters(), 2)
    check(engine.generate(PROMPTS, PARAMS))


def test_an_open_session_of_a_dead_trainer_is_closed(make, model):
    engine, (fake,) = make(1, serve_loaded=False, weight_sync="tensor")
    fake.session_open = True
    engine.update_weights(model.named_parameters(), 1)
    assert not fake.session_open
    check(engine.generate(PROMPTS, PARAMS))


def test_sleep_and_wake(make, flavour, model):
    engine, fakes = make(2, flavour, serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    engine.sleep()
    with pytest.raises(EngineError, match="wake"):
        engine.generate(PROMPTS, PARAMS)
    # A memory saver leaves the weights undefined: waking without a sync loads them again.
    for fake in fakes:
        fake.loaded = None
    engine.wake()
    assert all(fake.loaded is not None for fake in fakes)
    check(engine.generate(PROMPTS, PARAMS))
    engine.sleep()
    engine.update_weights(model.named_parameters(), 2)
    engine.wake()
    groups = engine.generate(PROMPTS, PARAMS)
    check(groups)
    assert {r.weight_version for g in groups for r in g} == {2}


def test_sglang_wakes_weights_before_the_cache(make, model):
    engine, (fake,) = make(1, serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    engine.sleep()
    fake.calls.clear()
    engine.update_weights(model.named_parameters(), 2)
    engine.wake()
    tags = [body["tags"] for path, body in fake.calls if path == "/resume_memory_occupation"]
    assert tags == [["weights"], ["kv_cache", "cuda_graph"]]


def test_vllm_takes_only_temperatures_whose_log_probs_it_reports(make):
    engine, _ = make(1, "vllm")
    with pytest.raises(ConfigError, match="temperature 0.5: .*rollout.temperature"):
        engine.generate(PROMPTS, SamplingParams(temperature=0.5, max_new_tokens=8))
    with pytest.raises(ConfigError, match="rollout.weight_sync tensor: .* syncs by disk"):
        make(1, "vllm", weight_sync="tensor")


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model_config", "logprobs_mode", "processed_logprobs", "runs with --logprobs-mode processed_logprobs"),
        ("device_config", "device", "cpu", "no sync would reach it. .* --worker-extension-cls vllm_cpu_head.LiveHead"),
    ],
)
def test_a_vllm_server_whose_replies_would_be_wrong_is_refused(make, section, field, value, message):
    """At once: neither waiting nor a restart changes its settings."""
    engine, (fake,) = make(1, "vllm")
    fake.server_info["vllm_config"][section][field] = value
    fake.calls.clear()
    with pytest.raises(EngineError, match=message) as refused:
        make_again(engine, serve_loaded=False)
    assert "recoveries in a row" not in str(refused.value) and not fake.calls


def make_again(engine, serve_loaded: bool):
    """Another engine in front of the same servers."""
    spec = engine_spec(engine._config, engine._model_dir, engine._model_dir.parent / "again", serve_loaded=serve_loaded)
    return type(engine)(spec)


def test_a_vllm_server_on_a_cpu_serves_a_tied_model_that_it_has_loaded_itself(make):
    engine, (fake,) = make(1, "vllm")
    fake.server_info["vllm_config"]["device_config"]["device"] = "cpu"
    again = make_again(engine, serve_loaded=True)
    check(again.generate(PROMPTS, PARAMS))
    again.close()


def test_a_vllm_server_without_development_mode_is_one_clear_error(make):
    engine, (fake,) = make(1, "vllm")
    fake.development_mode = False
    for serve_loaded in (True, False):
        with pytest.raises(EngineError, match="VLLM_SERVER_DEV_MODE=1") as refused:
            make_again(engine, serve_loaded)
        assert "recoveries in a row" not in str(refused.value)


def test_a_vllm_server_that_keeps_the_cache_of_old_weights_is_not_asked(make, model):
    """It answers so with status 200, while requests of others hold the cache."""
    engine, (fake,) = make(1, "vllm", serve_loaded=False, restarts=0)
    fake.requests_hold_the_cache = True
    with pytest.raises(WeightSyncError, match="reset_prefix_cache: the cache of the old weights was not dropped"):
        engine.update_weights(model.named_parameters(), 1)
    assert fake.version.endswith("-incomplete") and fake.paused


def test_a_vllm_server_whose_reload_failed_half_way_is_to_be_started_anew(make, model):
    """It goes on repeating the failure, and ends at the next request, while its health check is good."""
    engine, (fake,) = make(1, "vllm", serve_loaded=False, restarts=1)
    engine.update_weights(model.named_parameters(), 1)
    fake.control_faults = {"/collective_rpc": ["half"]}
    with pytest.raises(WeightSyncError, match="the error of the first load.*the server is paused.* start it anew"):
        engine.update_weights(model.named_parameters(), 2)
    with pytest.raises(EngineError, match="no rollout server can serve: .* start it anew"):
        engine.generate(PROMPTS, PARAMS)


def test_an_update_leaves_no_response_of_a_vllm_server_with_old_weights(make, model):
    """What runs is aborted, and asked for again when the server is resumed: until then requests wait."""
    engine, (fake,) = make(1, "vllm", serve_loaded=False, concurrency=4)
    engine.update_weights(model.named_parameters(), 1)
    fake.faults = [0] * 4 + ["until_paused"] * 4
    results = engine.generate_stream(PROMPTS, PARAMS)
    found = [next(results)]
    while fake.generations < 8:
        time.sleep(0.01)
    engine.update_weights(model.named_parameters(), 2)
    found += results
    groups = [group for _, group in sorted(found, key=lambda item: item[0])]
    check(groups)
    assert fake.generations >= len(PROMPTS) + 4 and not fake.paused
    assert sum({r.weight_version for r in group} == {2} for group in groups) >= len(PROMPTS) - 4


def test_a_sleeping_vllm_server_takes_requests_only_when_its_cache_has_memory(make, model):
    engine, (fake,) = make(1, "vllm", serve_loaded=False)
    engine.update_weights(model.named_parameters(), 1)
    engine.sleep()
    fake.calls.clear()
    engine.update_weights(model.named_parameters(), 2)
    paths = [path for path, _ in fake.calls]
    assert "/collective_rpc" in paths and "/resume" not in paths
    engine.wake()
    paths = [path for path, _ in fake.calls]
    assert paths[-2:] == ["/wake_up?tags=kv_cache", "/resume"] and not fake.paused


def test_more_than_a_vllm_server_takes_in_a_request_is_refused_before_it_is_sent(make):
    engine, (fake,) = make(1, "vllm")
    with pytest.raises(EngineError, match="5 stop texts: a vLLM server takes 4"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, stop=tuple("abcde")))
    with pytest.raises(EngineError, match="129 tokens whose log-probabilities are asked for: a vLLM server takes 128"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=8, watch_ids=(1,) * 129))
    assert fake.generations == 0


def test_branches_of_more_tokens_than_a_vllm_server_takes_are_several_requests(make, monkeypatch):
    engine, (fake,) = make(1, "vllm")
    tree = [Branch((), tuple(range(70))), Branch((5,), tuple(range(60, 100))), Branch((6,), (11, 50))]
    monkeypatch.setattr(vllm_replies, "_MOST_WATCHED", 99)
    scored = engine.branch_logprobs(PROMPTS[:1], tree)
    assert scored.shape == (1, 112) and fake.generations == 2
    assert [len(body["logprob_token_ids"]) for body in fake.bodies] == [70, 42]
    assert scored[0, [0, 69]].tolist() == [WATCHED, WATCHED - 69]


def test_a_batch_of_branches_counts_whole_or_not_at_all(make, flavour):
    engine, (fake,) = make(1, flavour)
    fake.faults = ["wrong_k"]
    scored = engine.branch_logprobs(PROMPTS[:1], [Branch((), (7,)), Branch((5,), (3,))])
    torch.testing.assert_close(scored, torch.tensor([[WATCHED - 7, WATCHED - 1005 - 3]]))
    assert fake.generations == 2


def test_a_vllm_server_looks_for_stop_texts_among_special_tokens_too(make):
    """As the other engines do: an anchor may hold some. Its default leaves them out of the text."""
    engine, (fake,) = make(1, "vllm")
    engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=8, stop=("<score>",)))
    assert fake.bodies[0]["skip_special_tokens"] is False


def test_a_server_that_says_that_it_has_failed_is_asked_whether_it_is_well(make, flavour):
    """vLLM's front end outlives its worker: the first sign is a status of 500."""
    engine, (fake,) = make(1, flavour)
    fake.faults = ["error_500"]
    before = engine._pool.replicas[0].recoveries
    check(engine.generate(PROMPTS, PARAMS))
    assert engine._pool.replicas[0].recoveries == before + 1


def test_closing_during_a_request_is_an_error_not_a_hang(make):
    engine, (fake,) = make(1)
    fake.faults = ["hang"]

    def close():
        while not fake.generations:
            time.sleep(0.001)
        engine.close()

    threading.Thread(target=close).start()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([[1]], PARAMS)


def test_a_closed_engine_says_so(make):
    engine, _ = make(1)
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.generate([[1]], PARAMS)


def test_the_fake_servers_tokens_differ_between_prompts_and_samples():
    """So a mix-up cannot pass the tests above."""
    fake = FakeServer()
    fake._server.server_close()
    assert len({tuple(expected_ids(p, k, 6)) for p in PROMPTS for k in range(3)}) > 60


@pytest.mark.parametrize("serve_loaded", [True, False])
@pytest.mark.parametrize("flavour", list(ENGINES))
def test_every_request_names_all_ends_of_sequence(flavour, serve_loaded, make, model, tmp_path):
    """Those of generation_config.json, which a server need not have read, and the tokenizer's."""
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [71, 80, 90]}')
    engine, (fake,) = make(flavour=flavour, serve_loaded=serve_loaded)
    if not serve_loaded:
        engine.update_weights(model.state_dict().items(), version=1)
    engine.generate(PROMPTS[:2], PARAMS)
    bodies = [body.get("sampling_params", body) for body in fake.bodies]
    assert [body["stop_token_ids"] for body in bodies] == [[1, 71, 80, 90]] * 2  # 1 is the tokenizer's

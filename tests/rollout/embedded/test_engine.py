"""The embedded engine against a loop without cache, padding, batching or stop automaton."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from real_megatron.config import RolloutConfig
from real_megatron.errors import EngineError, PromptRefused
from real_megatron.rollout.embedded.engine import TransformersEngine, build
from real_megatron.rollout.embedded.seeded import uniforms
from real_megatron.rollout.engine import SamplingParams
from real_megatron.scores import Branch, ScoreTree
from tests.support.rollout_models import byte_level, tiny_qwen3
from tests.support.rollout_specs import engine_spec

TOKENIZER = byte_level()
PARAMS = SamplingParams(n=3, temperature=0.8, top_p=0.9, max_new_tokens=20, stop=("e", " t"))
PROMPTS = [
    TOKENIZER.encode(text) for text in ("The answer", "a", "It ignores the question; [RESULT] 1 e", "poor", "is")
]
SEEDS = [11, 7, 2**62, 0, 5]


def random_model(config, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_qwen3(len(TOKENIZER) + 8, eos_token_id=TOKENIZER.eos_token_id))


@pytest.fixture
def engine(model):
    engine = TransformersEngine(model.config, TOKENIZER, batch_size=7)
    engine.update_weights(model.state_dict().items(), version=4)
    return engine


def expected(model, prompt: list[int], seed: int, k: int, params: SamplingParams):
    ids, logprobs = [], []
    for u in uniforms(seed, k, params.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, -1].double()
        probs = (logits / params.temperature).softmax(-1)
        order = probs.argsort(descending=True)
        kept = (probs[order].cumsum(0) - probs[order] < params.top_p).sum()
        cdf = probs[order[:kept]].cumsum(0)
        token = order[int((cdf <= u * cdf[-1]).sum())].item()
        ids.append(token)
        logprobs.append(probs[token].log().item())
        text = TOKENIZER.decode(ids)
        if any(stop in text for stop in params.stop):
            return ids, logprobs, "stop"
        if token == TOKENIZER.eos_token_id:
            return ids, logprobs, "eos"
    return ids, logprobs, "length"


def test_equals_the_definition_token_by_token(model, engine):
    responses = engine.generate(PROMPTS, PARAMS, SEEDS)
    reasons = set()
    for prompt, seed, group in zip(PROMPTS, SEEDS, responses, strict=True):
        assert len(group) == 3
        for k, response in enumerate(group):
            ids, logprobs, reason = expected(model, prompt, seed, k, PARAMS)
            assert (response.token_ids, response.finish_reason) == (ids, reason)
            # fp32 logits of a two-layer model against float64 softmax of fp32 logits.
            torch.testing.assert_close(torch.tensor(response.logprobs), torch.tensor(logprobs), atol=2e-5, rtol=0)
            assert response.weight_version == 4
            reasons.add(reason)
    assert reasons >= {"stop", "length"}


def test_end_of_sequence_stops_and_is_kept(model):
    engine = TransformersEngine(model.config, TOKENIZER)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    eos = TOKENIZER.eos_token_id
    # Aligned with the mean hidden direction the token becomes likely, not certain.
    state["model.embed_tokens.weight"][eos] = state["model.embed_tokens.weight"][20:60].mean(0) * 6
    engine.update_weights(state.items(), version=1)
    groups = engine.generate(PROMPTS, SamplingParams(n=8, max_new_tokens=40), SEEDS)
    ended = [r for g in groups for r in g if r.finish_reason == "eos"]
    assert ended
    for response in ended:
        assert response.token_ids.index(eos) == len(response.token_ids) - 1 == len(response.logprobs) - 1


def test_result_depends_on_prompt_and_seed_only(model, engine):
    together = engine.generate(PROMPTS, PARAMS, SEEDS)
    alone = [engine.generate([p], PARAMS, [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    reversed_ = engine.generate(PROMPTS[::-1], PARAMS, SEEDS[::-1])[::-1]
    one_by_one = TransformersEngine(model.config, TOKENIZER, batch_size=1)
    one_by_one.update_weights(model.state_dict().items(), version=4)
    for other in (alone, reversed_, one_by_one.generate(PROMPTS, PARAMS, SEEDS)):
        assert [[r.token_ids for r in g] for g in other] == [[r.token_ids for r in g] for g in together]
    assert engine.generate(PROMPTS, PARAMS, [s + 1 for s in SEEDS])[0][0].token_ids != together[0][0].token_ids
    unseeded = [engine.generate(PROMPTS, PARAMS)[0][0].token_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_branch_logprobs(model, engine):
    ids = [5, 300, 17]
    scored = engine.branch_logprobs(PROMPTS * 2, [Branch((), tuple(ids))])
    assert scored.dtype == torch.float32 and scored.shape == (10, 3)
    for row, prompt in zip(scored, PROMPTS * 2, strict=True):
        with torch.no_grad():
            exact = model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)[ids]
        torch.testing.assert_close(row.double(), exact, atol=2e-5, rtol=0)


TREE = ScoreTree(
    [[[5]], [[5, 300]], [[5, 17, 40, 9]], [[5, 17, 41]], [[6, 9]], [[300]], [[7, 8, 9]]], [TOKENIZER.eos_token_id]
)
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


@pytest.mark.parametrize("batch_size", [1, 2, 7, 256])
@pytest.mark.parametrize("changes", [{}, WINDOW, {"num_key_value_heads": 1, **WINDOW}], ids=["gqa", "window", "mqa"])
def test_branches_are_read_behind_whole_texts(changes, batch_size):
    """Sequences of many lengths, paths of many lengths: one batch with a cache against each text alone, without."""
    model = random_model(tiny_qwen3(len(TOKENIZER) + 8, **changes))
    engine = TransformersEngine(model.config, TOKENIZER, batch_size=batch_size)
    engine.update_weights(model.state_dict().items(), version=4)
    rows = []
    engine.model.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    scored = engine.branch_logprobs(PROMPTS, TREE.branches)
    assert max(rows) <= batch_size and scored.shape == (len(PROMPTS), TREE.width)
    for row, prompt in zip(scored, PROMPTS, strict=True):
        with torch.no_grad():
            behind = [
                model(torch.tensor([[*prompt, *branch.path]])).logits[0, -1].log_softmax(-1) for branch in TREE.branches
            ]
        exact = torch.cat([found[list(branch.ids)] for found, branch in zip(behind, TREE.branches, strict=True)])
        # fp32 sums of another batch shape.
        torch.testing.assert_close(row, exact, atol=1e-5, rtol=0)


def test_defaults_of_the_checkpoint_do_not_leak_into_sampling(model, tmp_path):
    model.generation_config = GenerationConfig(
        top_k=1, repetition_penalty=5.0, min_new_tokens=19, no_repeat_ngram_size=1, temperature=0.01, do_sample=True
    )
    model.save_pretrained(tmp_path)
    served = TransformersEngine.from_pretrained(tmp_path, TOKENIZER)
    assert served.version == 0
    ids, _, reason = expected(model, PROMPTS[0], 3, 0, PARAMS)
    response = served.generate(PROMPTS[:1], PARAMS, [3])[0][0]
    assert (response.token_ids, response.finish_reason) == (ids, reason)


def test_use_before_weights_asleep_and_after_a_failed_sync(model):
    engine = TransformersEngine(model.config, TOKENIZER)
    with pytest.raises(EngineError, match="update_weights"):
        engine.generate(PROMPTS, PARAMS)
    state = dict(model.state_dict())
    engine.update_weights(state.items(), version=1)
    engine.sleep()
    with pytest.raises(EngineError, match="wake"):
        engine.health()
    engine.wake()
    engine.health()
    engine.sleep()
    engine.update_weights(state.items(), version=1)
    engine.health()
    state["bogus.weight"] = torch.zeros(1)
    with pytest.raises(EngineError, match="bogus.weight"):
        engine.update_weights(state.items(), version=2)
    with pytest.raises(EngineError, match="update_weights"):
        engine.health()


def test_bad_requests(engine):
    with pytest.raises(PromptRefused, match="the sequence is empty") as refused:
        engine.generate([[1], []], PARAMS)
    assert refused.value.index == 1
    with pytest.raises(PromptRefused, match="250 tokens; with 20 new ones .* data.max_response_tokens") as refused:
        engine.generate([[1], [1], [1] * 250], PARAMS)
    assert refused.value.index == 2
    with pytest.raises(ValueError, match="2 prompts, but 1 seeds"):
        engine.generate(PROMPTS[:2], PARAMS, [1])


def test_close_ends_service(engine):
    engine.close()
    with pytest.raises(EngineError, match="no complete weights"):
        engine.generate(PROMPTS, PARAMS)


def test_saved_checkpoint_streams_in(model, tmp_path):
    model.save_pretrained(tmp_path)
    engine = TransformersEngine(model.config, TOKENIZER)
    engine.update_weights(load_file(tmp_path / "model.safetensors").items(), version=1)
    torch.testing.assert_close(
        engine.model(torch.tensor([PROMPTS[0]])).logits, model(torch.tensor([PROMPTS[0]])).logits
    )


def test_trained_and_judged_responses_end_at_every_end_of_sequence(model, tmp_path):
    """Those of generation_config.json as well; the tokens of both engines are those of one model, seed by seed."""
    model.save_pretrained(tmp_path)
    listed = list(range(20, 60))  # so many that most responses meet one
    GenerationConfig(eos_token_id=listed).save_pretrained(tmp_path)
    params = SamplingParams(n=4, max_new_tokens=16)
    groups = []
    for serve_loaded in (True, False):
        spec = engine_spec(RolloutConfig(), tmp_path, tmp_path, tokenizer=TOKENIZER, serve_loaded=serve_loaded)
        engine = build(spec)
        if not serve_loaded:
            engine.update_weights(model.state_dict().items(), version=0)
        groups.append(engine.generate(PROMPTS, params, SEEDS))
    ends = {*listed, TOKENIZER.eos_token_id}
    responses = [response for group in groups[1] for response in group]
    assert sum(response.finish_reason == "eos" for response in responses) > 5
    for response in responses:
        assert ends.isdisjoint(response.token_ids[:-1])
        assert (response.token_ids[-1] in ends) == (response.finish_reason == "eos")
    assert groups[0] == groups[1]


def test_no_sequence_whose_frequencies_depend_on_the_others_of_its_batch():
    """With longrope those beyond 20 tokens here: transformers then takes the long factors for the whole batch."""
    config = tiny_qwen3(len(TOKENIZER))
    half = config.head_dim // 2
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 20,
    }
    model = random_model(config)
    engine = TransformersEngine(config, TOKENIZER)
    engine.update_weights(model.state_dict().items(), version=1)
    params = SamplingParams(n=1, temperature=0.8, top_p=0.9, max_new_tokens=8)
    ((response,),) = engine.generate([PROMPTS[2][:12]], params, [3])
    assert response.token_ids == expected(model, PROMPTS[2][:12], 3, 0, params)[0]
    with pytest.raises(PromptRefused, match="13 tokens; with 8 new ones it exceeds the model's 20 pos") as refused:
        engine.generate([[5], [5] * 13], params, [3, 3])
    assert refused.value.index == 1

"""Float32 logits of 16-bit models, against float64 of the same weights and hidden states."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from real_megatron.config import RolloutConfig
from real_megatron.rollout.embedded import head as head_module
from real_megatron.rollout.embedded.engine import TransformersEngine, build
from real_megatron.rollout.embedded.head import Float32Head, use_float32_logits
from real_megatron.rollout.engine import SamplingParams
from real_megatron.scores import Branch
from tests.support.rollout_models import byte_level, tiny_qwen3
from tests.support.rollout_specs import engine_spec

TOKENIZER = byte_level()
TEXTS = ("is", "poor", "The answer", "It ignores the question; [RESULT] 1 e")
PROMPTS = sorted(map(TOKENIZER.encode, TEXTS), key=len)  # as the engine orders a batch
# Logits of up to 60: 32 exact products summed in float32, and the logarithm of a sum of 328 terms.
CLOSE = {"atol": 3e-5, "rtol": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A bfloat16 model whose largest logits are near 50, where one ulp of bfloat16 is 0.25."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_qwen3(len(TOKENIZER) + 8, initializer_range=3.0))
    model.bfloat16().save_pretrained(path)
    return path


def serve(checkpoint, **fields) -> TransformersEngine:
    fields = {"tokenizer": TOKENIZER, "dtype": torch.bfloat16, "serve_loaded": True} | fields
    return build(engine_spec(RolloutConfig(), checkpoint, checkpoint, **fields))


class Watch:
    """What reaches an engine's output layer, and its logits in float64."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.layer = engine.model.get_output_embeddings()
        self.hidden: list[torch.Tensor] = []
        self.layer.register_forward_pre_hook(lambda _, inputs: self.hidden.append(inputs[0][:, -1].clone()))

    def logits(self, call: int) -> torch.Tensor:
        return self.hidden[call].double() @ self.layer.weight.double().t()


def test_scores_that_tie_when_rounded_are_told_apart(checkpoint):
    engine = serve(checkpoint)
    watch = Watch(engine)
    engine.branch_logprobs(PROMPTS, [Branch((), (0,))])
    logits = watch.logits(0)
    # Of the pairs that are equal in bfloat16, the one whose float64 logits differ most.
    gap = (logits[0][:, None] - logits[0]).masked_fill(logits[0][:, None].bfloat16() != logits[0].bfloat16(), 0)
    first, second = divmod(int(gap.argmax()), logits.shape[1])
    assert gap.max() > 0.1
    ids = [first, second, 5, 300]
    found = engine.branch_logprobs(PROMPTS, [Branch((), tuple(ids))])
    exact = logits.log_softmax(-1)[:, ids]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, **CLOSE)
    torch.testing.assert_close((found[0, 0] - found[0, 1]).double(), gap.max(), **CLOSE)
    rounded = serve(checkpoint, fp32_logits=False).branch_logprobs(PROMPTS, [Branch((), tuple(ids))])
    assert rounded[0, 0] == rounded[0, 1]
    # Where the watched tokens were the whole scale, the expected score.
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    expected, score = (x.double().softmax(-1) @ values for x in (exact, found))
    torch.testing.assert_close(score, expected, **CLOSE)
    assert (rounded.double().softmax(-1) @ values - expected).abs().max() > 0.02


@pytest.mark.parametrize("temperature", [0.8, 1.0, 0.0])
def test_sampled_and_watched_logprobs(checkpoint, temperature):
    """Also after a sync, which streams the tied weight under its own name, and a nap."""
    source = serve(checkpoint).model.state_dict()
    engine = serve(checkpoint, serve_loaded=False)
    engine.update_weights(source.items(), version=1)
    engine.sleep()
    engine.wake()
    watch = Watch(engine)
    params = SamplingParams(temperature=temperature, max_new_tokens=12, watch_ids=(5, 300))
    ((response,),) = engine.generate(PROMPTS[-1:], params, [3])
    assert len(response.token_ids) == len(watch.hidden)
    for step, token in enumerate(response.token_ids):
        exact = (watch.logits(step)[0] / (temperature or 1)).log_softmax(-1)
        if temperature == 0:
            assert token == exact.argmax()
        found = torch.tensor([response.logprobs[step], *response.watched[step]], dtype=torch.float64)
        torch.testing.assert_close(found, exact[[token, 5, 300]], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_of_the_vocabulary(monkeypatch, dtype, bias):
    monkeypatch.setattr(head_module, "_CPU_CHUNK_BYTES", 5 * 4 * 16)  # 5 rows of 16 columns, of 23 rows
    torch.manual_seed(0)
    layer = nn.Linear(16, 23, bias=bias, dtype=dtype)
    hidden = torch.randn(2, 3, 16, dtype=dtype)[:, 1:]
    exact = nn.functional.linear(hidden.double(), layer.weight.double(), layer.bias.double() if bias else None)
    layer.__class__ = Float32Head
    with torch.no_grad():
        found = layer(hidden)
    assert found.dtype == torch.float32
    # 16 products below 4
    torch.testing.assert_close(found.double(), exact, atol=4e-6, rtol=0)


def test_only_a_plain_16_bit_layer_is_changed(caplog):
    model = AutoModelForCausalLM.from_config(tiny_qwen3(16))
    with caplog.at_level(logging.WARNING):
        use_float32_logits(model)
        assert type(model.lm_head) is nn.Linear and not caplog.records
        model.bfloat16()
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        use_float32_logits(model)
        assert type(model.lm_head) is Float32Head and not caplog.records
        assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
        assert model.lm_head.weight is model.model.embed_tokens.weight

    class Quantized(nn.Linear): ...

    model.lm_head = Quantized(32, 16)
    use_float32_logits(model)
    assert type(model.lm_head) is Quantized and "Quantized" in caplog.text

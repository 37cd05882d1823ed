"""A chat prompt holds end-of-sequence tokens, one after each turn: nobody may mask them as if they were padding."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from real_megatron.batch.types import Group
from real_megatron.config import DataConfig
from real_megatron.data import JudgeExample, encode_prompt, encode_target
from real_megatron.data.byte_model import make_byte_model
from real_megatron.rollout.embedded.engine import TransformersEngine
from real_megatron.scores import Branch, ScoreScale
from tests.support.policy_ranks import make_config
from tests.support.ranks import run_ranks
from tests.support.training_ranks import scored_by_the_policy

CHAT = "{% for m in messages %}{{ m['content'] }}<eos>{% endfor %}"


def test_policy_and_engine_read_the_end_of_sequence_tokens_of_a_prompt(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_byte_model(tmp_path, vocab_size=320, initializer_range=0.3))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = CHAT
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    turns = [{"role": role, "content": role[:3]} for role in ("user", "assistant", "user")]
    example = JudgeExample("x", turns, label=4.0, cot="so so")
    prompt, eos = encode_prompt(tokenizer, example, DataConfig()), tokenizer.eos_token_id
    assert prompt == [*b"use", eos, *b"ass", eos, *b"use", eos]
    target = encode_target(tokenizer, scale, example)
    assert target.answer_index is not None

    def expected(mask_ends: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([prompt + target.response_ids])
        positions = torch.arange(ids.shape[1])
        seen = (ids != eos) | (positions >= len(prompt)) if mask_ends else torch.ones_like(ids).bool()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=seen.long(), position_ids=positions[None]).logits
        logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # row t predicts response token t
        tokens = logp.gather(1, ids[0, len(prompt) :, None])[:, 0][torch.tensor(target.loss_mask)]
        return tokens, logp[target.answer_index + 1, scale.score_ids]

    config = make_config(tmp_path)
    ((tokens, scores),) = run_ranks(1, scored_by_the_policy, config, [Group(prompt, [target], 4.0, "x")], scale)[0]
    want_tokens, want_scores = expected(mask_ends=False)
    # float32 log-probs of two implementations of one model
    torch.testing.assert_close(torch.tensor(tokens), want_tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(scores), want_scores, rtol=0, atol=1e-5)
    assert (expected(mask_ends=True)[0] - want_tokens).abs().max() > 1e-2, "masking them must make a difference here"

    engine = TransformersEngine.from_pretrained(tmp_path, tokenizer)
    before_score = prompt + target.response_ids[: target.answer_index + 1]
    padded = [before_score, [*b"much longer than the other sequence, so that the first one is padded on its left"]]
    read = engine.branch_logprobs(padded, [Branch((), tuple(scale.score_ids))])[0]
    torch.testing.assert_close(read, want_scores, rtol=0, atol=1e-5)

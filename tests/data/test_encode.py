import functools
from collections.abc import Callable

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from real_megatron.batch.score_logprobs import score_logprobs
from real_megatron.config import DataConfig, ObjectiveConfig
from real_megatron.data import JudgeExample, encode, encode_prompt, encode_prompts, encode_target, encode_targets
from real_megatron.data.byte_model import byte_tokenizer
from real_megatron.data.encode import end_of_response
from real_megatron.errors import ConfigError, DataError
from real_megatron.objective import ScoredBatch, Totals, build_objective
from real_megatron.scores import ScoreScale
from tests.support.rollout_models import byte_fallback, byte_level

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] }}{% if not loop.last %}</>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}</><assistant>{% endif %}"
)
DATA = DataConfig()
Make = Callable[[], PreTrainedTokenizerFast]


def user(text: str, **fields: object) -> JudgeExample:
    return JudgeExample("x", [{"role": "user", "content": text}], **fields)


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """Adds <pad> as a beginning and <eos> as an end to every text."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 256), ("<eos>", 257)]
    )
    return tokenizer


def test_prompt_without_chat_template() -> None:
    assert encode_prompt(byte_tokenizer(), user("äb "), DATA) == list("äb ".encode())
    both = JudgeExample("x", [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    assert encode_prompt(byte_tokenizer(), both, DATA) == list(b"s\n\nu")


def test_prompt_keeps_the_beginning_and_never_an_end_of_sequence() -> None:
    assert encode_prompt(closing_tokenizer(), user("a"), DATA) == [256, 97]


def test_prompt_with_chat_template() -> None:
    tokenizer = closing_tokenizer()
    tokenizer.chat_template = CHAT
    assert encode_prompt(tokenizer, user("a"), DATA) == list(b"<user>a</><assistant>")
    begun = JudgeExample("x", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Feedback:"}])
    assert encode_prompt(tokenizer, begun, DATA) == list(b"<user>a</><assistant>Feedback:")
    assert encode_prompt(tokenizer, user("a"), DataConfig(chat_template=False)) == [256, 97]
    with pytest.raises(DataError, match="example x: the tokenizer's chat template refuses .* system, user: no system"):
        encode_prompt(tokenizer, JudgeExample("x", [{"role": "system", "content": "s"}, *user("a").messages]), DATA)


def test_empty_prompts_are_refused() -> None:
    with pytest.raises(DataError, match="example x: the prompt is empty"):
        encode_prompt(byte_tokenizer(), user(""), DATA)


def test_long_prompts_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    examples = [user("a" * n) for n in (1, 5, 6, 9)]
    prompts = encode_prompts(byte_tokenizer(), examples, DataConfig(max_prompt_tokens=5))
    assert (prompts.dropped, prompts.cut) == (2, 0)
    assert [(e, len(ids)) for e, ids in prompts.kept] == [(examples[0], 1), (examples[1], 5)]
    assert "dropped 2 of 4 examples whose prompt is longer than 5 tokens (data.max_prompt_tokens)" in caplog.text
    assert not encode_prompts(byte_tokenizer(), [], DATA).kept


def test_long_prompts_are_cut_behind_their_begin_of_sequence(caplog: pytest.LogCaptureFixture) -> None:
    data = DataConfig(max_prompt_tokens=5, long_prompts="cut_left")
    examples = [user("abcdefg"[:n]) for n in (4, 5, 6, 7)]
    prompts = encode_prompts(byte_tokenizer(), examples, data)
    assert [bytes(ids) for _, ids in prompts.kept] == [b"abcd", b"abcde", b"bcdef", b"cdefg"]
    assert (prompts.dropped, prompts.cut) == (0, 2)
    assert "cut the beginning of 2 of 4 examples whose prompt is longer than 5 tokens" in caplog.text
    tokenizer = closing_tokenizer()
    tokenizer.bos_token = "<pad>"
    cut = [ids for _, ids in encode_prompts(tokenizer, examples, data).kept]
    assert cut == [[256, *b"abcd"], [256, *b"bcde"], [256, *b"cdef"], [256, *b"defg"]]


def test_what_is_counted_and_logged_is_of_all_chunks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK", 2)
    examples = [
        JudgeExample(f"row {i}", user(text).messages) for i, text in enumerate(["<eos>", "abcdefgh", "", "a<eos>"])
    ]
    data = DataConfig(max_prompt_tokens=7)
    with pytest.raises(DataError, match="example row 2: the prompt is empty"):
        encode_prompts(byte_tokenizer(), examples, data)
    examples[2] = JudgeExample("row 2", user("bc").messages)
    prompts = encode_prompts(byte_tokenizer(), examples, data)
    assert [(e.id, bytes(ids)) for e, ids in prompts.kept] == [
        ("row 0", b"<eos>"),
        ("row 2", b"bc"),
        ("row 3", b"a<eos>"),
    ]
    assert (len(prompts.kept), prompts.dropped, prompts.cut) == (3, 1, 0)
    assert caplog.text.count("dropped 1 of 4 examples") == 1
    assert "the prompts of 2 of 4 examples contain control tokens of the model, the first is row 0" in caplog.text


def test_variables_of_the_chat_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if not enable_thinking %}|{% endif %}"
    assert (
        bytes(encode_prompt(tokenizer, user("a"), DataConfig(chat_template_args={"enable_thinking": False}))) == b"a|"
    )
    assert bytes(encode_prompt(tokenizer, user("a"), DataConfig(chat_template_args={"enable_thinking": True}))) == b"a"


@pytest.mark.parametrize(
    ("generation", "closed"),
    [
        ("<think>\\n", "<think>\n\n</think>\n\n"),
        ("<think>", "<think>\n\n</think>\n\n"),
        ("[THINK]", "[THINK]\n\n[/THINK]\n\n"),
        ("<seed:think>\\n\\n", "<seed:think>\n\n</seed:think>\n\n"),
        ("<think>\\n\\n</think>\\n\\n", "<think>\n\n</think>\n\n"),
        ("<|im_start|>", "<|im_start|>"),
    ],
)
def test_a_thinking_block_that_the_template_begins_is_closed(generation: str, closed: str) -> None:
    """Prompts of training, judging and evaluation all come from here: the response begins behind the block."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}!{% if add_generation_prompt %}{{ '" + generation + "' }}{% endif %}"
    )
    assert bytes(encode_prompt(tokenizer, user("a"), DATA)).decode() == f"a!{closed}"
    scale = ScoreScale.resolve(tokenizer, ["1", "2"])
    (group,) = encode_targets(tokenizer, scale, [user("a", cot="c", label=1.0)], DATA).groups
    assert bytes(group.prompt_ids).decode() == f"a!{closed}"


def test_a_thinking_block_in_the_data_is_the_datas_own() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert bytes(encode_prompt(tokenizer, user("a<think>"), DATA)) == b"a<think>"


def test_target_by_hand() -> None:
    tokenizer = byte_tokenizer()
    scale = ScoreScale.resolve(tokenizer, list("12345"))
    target = encode_target(tokenizer, scale, user("p", cot=" ok ", label=3.6))
    assert target.response_ids == [*b"ok\n[RESULT] 4", 257]
    assert target.answer_index == len(b"ok\n[RESULT] ") - 1
    assert target.loss_mask == [True] * 12 + [False, True]
    assert target.finish_reason == "given"


HALVES = ["1", "1.5", "2", "2.5", "3"]


def test_target_of_several_tokens_by_hand() -> None:
    tokenizer = byte_tokenizer()
    spellings = {"1.5": ["1,5"], "2": ["two"]}
    scale = ScoreScale.resolve(tokenizer, HALVES, spellings=spellings)
    ended = ScoreScale.resolve(tokenizer, HALVES, spellings=spellings, ends=["eos"])
    for label, text in ((1.6, b"1.5"), (2.1, b"2"), (3.0, b"3")):
        for own, end_has_a_loss in ((scale, True), (ended, text != b"2")):
            target = encode_target(tokenizer, own, user("p", cot="ok", label=label))
            assert target.response_ids == [*b"ok\n[RESULT] ", *text, 257]
            assert target.answer_index == len(b"ok\n[RESULT] ") - 1
            assert target.loss_mask == [True] * 12 + [False] * len(text) + [end_has_a_loss]
    # What a judge reads in the target is the score that it was made for.
    assert ended.tree.read(target.response_ids[12:]) == (4, 1)


@pytest.mark.parametrize("ends", [[], ["eos"]], ids=["complement", "end"])
def test_the_likelihood_of_a_target_is_that_of_its_tokens(ends: list[str]) -> None:
    """A random model, float64: answer and token losses of `sft` together are the sum of the log-probs of the target's
    tokens, each counted once. Sums of some 20 numbers of about 6: tolerance 1e-12.

    Without ends a score that could go on has besides the probability that it does not: its end has a loss of its own.
    """
    tokenizer = byte_tokenizer()
    scale = ScoreScale.resolve(tokenizer, HALVES, ends=ends)
    tree, values = scale.tree, torch.tensor(scale.values, dtype=torch.float64)

    @functools.cache
    def model(prefix: tuple[int, ...]) -> Tensor:
        g = torch.Generator().manual_seed(sum((i + 1) * token for i, token in enumerate(prefix)))
        return torch.randn(len(tokenizer), generator=g, dtype=torch.float64).log_softmax(-1)

    for k, value in enumerate(scale.values):
        target = encode_target(tokenizer, scale, user("p", cot="ok", label=value))
        ids, begin = target.response_ids, target.answer_index + 1
        tokens = torch.stack([model(tuple(ids[:t]))[token] for t, token in enumerate(ids)])
        asked = [model((*ids[:begin], *branch.path))[list(branch.ids)] for branch in tree.branches]
        own = tokens[torch.tensor(target.loss_mask)]
        scored = ScoredBatch(
            token_logprobs=own,
            token_trajectory=torch.zeros(len(own), dtype=torch.long),
            score_logprobs=score_logprobs(tree, torch.cat(asked))[None],
            has_answer=torch.tensor([True]),
            labels=values[k : k + 1],
            group=torch.tensor([0]),
            values=values,
        )
        loss, _ = build_objective(ObjectiveConfig(name="sft"))(scored, Totals(1, 1, len(own)))
        want = tokens.sum()
        if not ends and tree.could_go_on(k):
            goes_on = model(tuple(ids[: begin + 1]))[ord(".")]
            want = want + (1 - goes_on.exp()).log()
        torch.testing.assert_close(-loss * (len(own) + 1), want, rtol=0, atol=1e-12)


def test_the_end_of_a_target_is_one_of_the_scales() -> None:
    tokenizer = byte_tokenizer()
    example = user("p", cot="ok", label=2)
    lines = ScoreScale.resolve(tokenizer, HALVES, ends=["\n"])
    with pytest.raises(ConfigError, match="scale.ends: supervised responses end with '<eos>', .*; add 'eos'"):
        encode_target(tokenizer, lines, example)
    with pytest.raises(ConfigError, match="scale.ends: supervised responses end with '<pad>', .*; add '<pad>'"):
        encode_target(tokenizer, lines, example, 256)
    both = ScoreScale.resolve(tokenizer, HALVES, ends=["\n", "<pad>"])
    assert encode_target(tokenizer, both, example, 256).response_ids[-1] == 256
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end of sequence, .*; leave scale.ends empty"):
        encode_target(tokenizer, lines, example)


@pytest.mark.parametrize("make", [byte_tokenizer, byte_level, byte_fallback])
@pytest.mark.parametrize(
    "cot", ["A short answer.", "", "很好\n\n- a\n- b", "It is [RES ULT] 3 [", "x [RESULT] 2", "x [RESULT]"]
)
@pytest.mark.parametrize("anchor", ["[RESULT] ", "[RESULT]", "### Score: "])
def test_a_generated_copy_of_the_target_is_cut_where_the_target_has_its_answer(
    make: Make, cot: str, anchor: str
) -> None:
    """Training and sampling agree on where the score is due, and the text reads as intended, for every tokenizer."""
    tokenizer = make()
    scale = ScoreScale.resolve(tokenizer, list("145"), anchor=anchor)
    target = encode_target(tokenizer, scale, user("p", cot=cot, label=4))
    assert target.answer_index is not None
    begin = target.answer_index + 1
    assert scale.cut(tokenizer, target.response_ids) == begin
    assert target.response_ids[begin - len(scale.anchor_ids) : begin] == scale.anchor_ids
    assert target.response_ids[begin:] == [scale.score_ids[1], tokenizer.eos_token_id]
    assert [i for i, kept in enumerate(target.loss_mask) if not kept] == [begin]
    assert len(target.loss_mask) == len(target.response_ids)
    text = tokenizer.decode(target.response_ids[:begin]).strip()
    stated = cot.partition(anchor.strip())[0].strip()
    assert text.split() == f"{stated}\n{anchor}".split()


def test_target_needs_a_critique_and_a_label() -> None:
    tokenizer = byte_tokenizer()
    scale = ScoreScale.resolve(tokenizer, ["1", "2"])
    with pytest.raises(DataError, match="example x has no critique"):
        encode_target(tokenizer, scale, user("p", label=1.0))
    with pytest.raises(DataError, match="example x has no label"):
        encode_target(tokenizer, scale, user("p", cot="c"))


def test_targets_are_groups_and_long_ones_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer()
    scale = ScoreScale.resolve(tokenizer, ["1", "2"], anchor="=")
    examples = [user(p, cot=c, label=1.4) for p, c in (("a", "c"), ("bb", "c"), ("a", "cc"))]
    encoded = encode_targets(tokenizer, scale, examples, DataConfig(max_prompt_tokens=1, max_response_tokens=5))
    (group,) = encoded.groups
    assert (encoded.dropped, encoded.cut) == (2, 0)
    assert (group.prompt_ids, group.label, group.example_id) == ([97], 1.4, "x")
    assert group.trajectories[0].response_ids == [*b"c\n=1", 257]
    assert "dropped 1 of 3 examples whose prompt is longer than 1 tokens (data.max_prompt_tokens)" in caplog.text
    assert "dropped 1 of 2 examples whose response is longer than 5 tokens (data.max_response_tokens)" in caplog.text


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} <pad>\n{% endfor %}"
PAD, EOS = 256, 257


@pytest.mark.parametrize(
    ("template", "stops", "chat_template", "end"),
    [
        (TURNS, [PAD, EOS], True, PAD),  # Llama 3 Instruct: <|eot_id|>, and not <|end_of_text|>
        (TURNS, [EOS], True, EOS),  # a base model with a template: generation does not stop at the end of a turn
        (TURNS, [PAD, EOS], False, EOS),
        (None, [PAD, EOS], True, EOS),
        (CHAT, [PAD, EOS], True, EOS),  # this one writes nothing behind the last turn
        ("{{ raise_exception('no') }}", [PAD, EOS], True, EOS),
    ],
)
def test_a_target_ends_as_the_template_ends_a_turn(
    template: str | None, stops: list[int], chat_template: bool, end: int
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    data = DataConfig(chat_template=chat_template, max_prompt_tokens=100, max_response_tokens=100)
    assert end_of_response(tokenizer, stops, data) == end
    if template != "{{ raise_exception('no') }}":
        scale = ScoreScale.resolve(tokenizer, list("12345"))
        example = user("p", cot="ok", label=4)
        (group,) = encode_targets(tokenizer, scale, [example], data, stops).groups
        assert group.trajectories[0].response_ids[-2:] == [scale.score_ids[3], end]
        assert group.trajectories[0].loss_mask[-2:] == [False, True]


def test_the_end_of_a_turn_is_what_the_templates_variables_make_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ end | default('~') }}{% endfor %}"
    ends = [ord("~"), ord("^")]
    assert end_of_response(tokenizer, ends, DATA) == ord("~")
    assert end_of_response(tokenizer, ends, DataConfig(chat_template_args={"end": "^"})) == ord("^")

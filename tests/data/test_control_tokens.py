"""Control tokens in text from data are ordinary text; those of the chat template stay tokens, in every family."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from real_megatron.config import DataConfig
from real_megatron.data import JudgeExample, encode_prompt, encode_prompts, encode_target
from real_megatron.data.control_tokens import ControlTokens, _any_of
from real_megatron.errors import DataError
from real_megatron.scores import ScoreScale, decode
from tests.support import chat_templates
from tests.support.real_tokenizers import NAMES, real_tokenizer
from tests.support.rollout_models import byte_fallback, byte_level, word_level

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA_4 = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"]
MISTRAL = ["<s>", "</s>", "[INST]", "[/INST]"]
SYSTEM = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
FAMILIES: dict[str, tuple[Callable[[], PreTrainedTokenizerFast], list[str], str]] = {
    "chatml": (byte_level, CHATML, chat_templates.CHATML),
    "llama_3": (byte_level, LLAMA_3, chat_templates.LLAMA_3),
    "llama_4": (byte_level, LLAMA_4, chat_templates.LLAMA_4),
    "mistral_v1": (byte_fallback, MISTRAL[:2], chat_templates.MISTRAL),
    "mistral_v3": (byte_fallback, MISTRAL, chat_templates.MISTRAL),
    "mistral_v7": (byte_fallback, MISTRAL + SYSTEM, chat_templates.MISTRAL_V7),
    "tekken": (byte_level, MISTRAL, chat_templates.MISTRAL),
    "deepseek_r1": (byte_level, DEEPSEEK, chat_templates.DEEPSEEK_R1),
}
WRITTEN = ["<think>", "</think>", "<tool_call>", "<｜User｜>", "<｜Assistant｜>"]
"""Added tokens that are not special."""
ATTACK = "".join(
    f" fine{text}\n"
    for text in [*CHATML, *LLAMA_3, *LLAMA_4, *MISTRAL, *SYSTEM, *DEEPSEEK, *WRITTEN, "<start_of_turn>"]
)
ORDINARY = "  The answer, é 很好 <b>: [1] 5 < 6 | |> x\n\n  indented  "


def family(name: str) -> PreTrainedTokenizerFast:
    make, special, template = FAMILIES[name]
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(t, normalized=False) for t in special]})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in WRITTEN])
    tokenizer.bos_token, tokenizer.eos_token = special[0], special[1]
    tokenizer.chat_template = template
    return tokenizer


def user(text: str, **fields: object) -> JudgeExample:
    return JudgeExample("x", [{"role": "user", "content": text}], **fields)


def by_transformers(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    messages = user(text).messages
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    closed = tokenizer.chat_template == chat_templates.DEEPSEEK_R1
    return ids + tokenizer.encode("\n</think>\n\n", add_special_tokens=False) if closed else ids


def added(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: bool = False) -> list[int]:
    """The added tokens among the ids, or the special ones of them."""
    tokens = tokenizer.added_tokens_decoder.items()
    known = {id for id, t in tokens if (t.special or not special) and not t.content.startswith("<0x")}
    return [id for id in ids if id in known - {tokenizer.unk_token_id}]


def visible(text: str) -> str:
    """Without spaces, and without SentencePiece's letter for one, which it cannot tell from a space."""
    return "".join(text.replace("▁", " ").split())


@pytest.fixture(scope="module", params=[*FAMILIES, *(f"real_{name}" for name in NAMES)])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    name = request.param
    return family(name) if name in FAMILIES else real_tokenizer(name.removeprefix("real_"))


def test_data_write_no_control_token(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = by_transformers(tokenizer, ORDINARY)
    assert encode_prompt(tokenizer, user(ORDINARY), DataConfig()) == harmless
    attack = encode_prompt(tokenizer, user(ATTACK), DataConfig())
    injected = by_transformers(tokenizer, ATTACK)
    own = added(tokenizer, harmless)
    assert added(tokenizer, attack, special=True) == added(tokenizer, harmless, special=True)
    assert len(added(tokenizer, injected, special=True)) > len(added(tokenizer, harmless, special=True))
    # Added tokens that are not special and that this family's template does not write are part of the language.
    unwritten = [text for text in WRITTEN if text not in tokenizer.chat_template]
    written = "".join(line for line in ATTACK.splitlines(True) if not any(text in line for text in unwritten))
    assert added(tokenizer, encode_prompt(tokenizer, user(written), DataConfig())) == own
    # The same text, but for spaces beside tokens.
    assert visible(decode(tokenizer, attack)) == visible(decode(tokenizer, injected))
    # The careful way is exact: it gives what transformers gives, where there is nothing to take care of.
    monkeypatch.setattr(ControlTokens, "find", lambda self, text, shown: "something")
    assert encode_prompt(tokenizer, user(ORDINARY), DataConfig()) == harmless


def test_critiques_and_plain_prompts_hold_no_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = DataConfig(chat_template=False)
    assert encode_prompt(tokenizer, user(ORDINARY), plain) == tokenizer(ORDINARY)["input_ids"]
    begin = added(tokenizer, tokenizer(ORDINARY)["input_ids"])
    assert added(tokenizer, encode_prompt(tokenizer, user(ATTACK), plain), special=True) == begin
    scale = ScoreScale.resolve(tokenizer, list("145"))
    target = encode_target(tokenizer, scale, user("p", cot=ATTACK, label=4.0))
    assert added(tokenizer, target.response_ids, special=True) == [tokenizer.eos_token_id]
    assert target.response_ids[-1] == tokenizer.eos_token_id
    assert scale.cut(tokenizer, target.response_ids) == (target.answer_index or 0) + 1
    text = decode(tokenizer, target.response_ids[:-1])
    assert visible(text) == visible(f"{ATTACK}[RESULT]4")
    if len(tokenizer) < 1000:  # one of the small ones, with few tokens for scores
        return
    for scores in (list("12345"), list("0123456789"), list("ABCDE")):
        for anchor in ("[RESULT] ", "Score: ", "So the overall score is ", "### Result\n", "Verdict ("):
            scale = ScoreScale.resolve(tokenizer, scores, anchor=anchor)
            assert [decode(tokenizer, [id]).strip() for id in scale.score_ids] == scores
            response = tokenizer.encode(f"Fine.\n{scale.anchor_text}", add_special_tokens=False)
            assert scale.cut(tokenizer, response) == len(response)


def test_a_critique_keeps_what_the_model_itself_writes() -> None:
    tokenizer = family("chatml")
    scale = ScoreScale.resolve(tokenizer, list("145"))
    target = encode_target(tokenizer, scale, user("p", cot="<think>so</think> ok<|im_end|>", label=4.0))
    think = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert added(tokenizer, target.response_ids) == [*think, tokenizer.eos_token_id]
    # A turn of the judge likewise; what it is shown, not.
    turns = [{"role": role, "content": "<think>a</think>"} for role in ("user", "assistant", "user")]
    turns[0]["content"] += "<|im_end|>"
    ids = encode_prompt(tokenizer, JudgeExample("x", turns), DataConfig())
    assert [id for id in ids if id in think] == think


def test_roles_are_data_too() -> None:
    tokenizer = family("chatml")
    example = JudgeExample("x", [{"role": "user<|im_end|>", "content": "a"}])
    ends = encode_prompt(tokenizer, example, DataConfig()).count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == 1


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "WordPiece"])
def test_models_whose_vocabulary_holds_the_control_token(kind: str) -> None:
    """The copy must not find the text as an ordinary piece either."""
    if kind == "WordLevel":
        tokenizer = word_level()
        text, expected = "a <eos> b", ["a", "<unk>", "b"]
    else:
        pieces = ["<unk>", "<eos>", "a", "b", "<", ">", "e", "o", "s"]
        if kind == "Unigram":
            model = models.Unigram([(piece, -1.0) for piece in pieces], 0)
        else:
            names = [piece if len(piece) > 1 or piece in "ab<" else f"##{piece}" for piece in pieces]
            model = models.WordPiece({piece: i for i, piece in enumerate([*names, "##<", "##b"])}, unk_token="<unk>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), eos_token="<eos>", unk_token="<unk>")
        text, expected = "a<eos>b", list("a<eos>b")
        if kind == "WordPiece":
            expected = ["a", *(f"##{c}" for c in "<eos>b")]
    ids = encode_prompt(tokenizer, user(text), DataConfig())
    assert tokenizer.convert_ids_to_tokens(ids) == expected


def test_tokens_that_are_found_in_the_normalised_text() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|x|>", normalized=True)]})
    wide = "a ＜｜x｜＞ b"
    control = tokenizer.convert_tokens_to_ids("<|x|>")
    assert control in tokenizer.encode(wide)
    ids = encode_prompt(tokenizer, user(wide), DataConfig())
    assert control not in ids and decode(tokenizer, ids) == "a <|x|> b"


def test_what_cannot_be_kept_apart_is_refused() -> None:
    tokenizer = family("chatml")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'][:21] }}{% endfor %}"
    with pytest.raises(DataError, match="example x: its text contains control tokens .* remove them from the data"):
        encode_prompt(tokenizer, user("a <|im_end|>"), DataConfig())


def test_prompts_with_control_tokens_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = family("chatml")
    examples = [user("a"), JudgeExample("bad", user("<|im_end|>").messages)]
    assert len(encode_prompts(tokenizer, examples, DataConfig()).kept) == 2
    assert "prompts of 1 of 2 examples contain control tokens of the model, the first is bad" in caplog.text


def test_changed_tokens_and_templates_are_noticed() -> None:
    tokenizer = family("chatml")
    assert ControlTokens.of(tokenizer) is ControlTokens.of(tokenizer)
    assert ControlTokens.of(tokenizer).find("<tool_call>", shown=True) is None
    tokenizer.chat_template += "<tool_call>"
    assert ControlTokens.of(tokenizer).find("<tool_call>", shown=True) == "<tool_call>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert ControlTokens.of(tokenizer).find("<new>", shown=False) == "<new>"


@given(st.lists(st.text("<a|", min_size=1, max_size=6), max_size=8), st.text("<a|b", max_size=30))
def test_the_longest_control_token_is_found_first(texts: list[str], text: str) -> None:
    one_by_one = re.compile("|".join(map(re.escape, sorted(set(texts), key=len, reverse=True))) or "(?!)")
    assert _any_of(texts).findall(text) == one_by_one.findall(text)

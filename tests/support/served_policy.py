"""What a real server has served, beside transformers in fp32 on the same weights."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from real_megatron.rollout.engine import Response, RolloutEngine, SamplingParams
from real_megatron.scores import Branch, ScoreTree
from tests.support.rollout_models import byte_level

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id
PROMPTS = [TOKENIZER.encode(text) for text in ("The answer", "poor answer;", "It ignores the question", "a", "short")]


def policy(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def worst_difference(
    groups: Sequence[Sequence[Response]],
    model: PreTrainedModel,
    temperature: float,
    prompts: Sequence[list[int]],
    watch_ids: Sequence[int],
) -> float:
    """Largest |engine − policy| over sampled and watched log-probs."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for response in group:
            ids = torch.tensor(response.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response.token_ids])).logits[0].double()
            exact = (logits / (temperature or 1)).log_softmax(-1)[len(prompt) - 1 : -1]
            worst = max(
                worst, (exact.gather(1, ids[:, None])[:, 0] - torch.tensor(response.logprobs)).abs().max().item()
            )
            if response.watched:
                watched = exact[:, list(watch_ids)] - torch.tensor(response.watched)
                worst = max(worst, watched.abs().max().item())
    return worst


@torch.no_grad()
def make_end_likely(model: PreTrainedModel, prompts: Sequence[list[int]], eos: int) -> None:
    """The end of sequence becomes likely, not certain: a logit of 5 where the hidden state is the mean one. The model's
    embedding is tied to its output layer."""
    mean = torch.cat([model.model(torch.tensor([p])).last_hidden_state[0] for p in prompts]).mean(0)
    model.model.embed_tokens.weight[eos] = 5 * mean / mean.square().sum()


def check_endings(groups: Sequence[Sequence[Response]], tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Responses to the stop texts "a" and " t" end as they say, and in each way that there is."""
    reasons = {"stop": 0, "eos": 0, "length": 0}
    for response in (r for group in groups for r in group):
        reasons[response.finish_reason] += 1
        ids = response.token_ids
        text, before = tokenizer.decode(ids), tokenizer.decode(ids[:-1])
        if response.finish_reason == "stop":
            assert ("a" in text or " t" in text) and "a" not in before and " t" not in before
        elif response.finish_reason == "eos":
            assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
        else:
            assert len(ids) == longest and tokenizer.eos_token_id not in ids and "a" not in text
    assert all(reasons.values()), reasons


def check_syncs(engine: RolloutEngine, config: PretrainedConfig, params: SamplingParams) -> None:
    """After each of three syncs the log-probs are those of the new weights, and not of the old ones."""
    previous = None
    for version in (1, 2, 3):
        model = policy(config, 10 + version)
        engine.update_weights(model.named_parameters(), version)
        groups = engine.generate(PROMPTS, params)

        def worst(model: PreTrainedModel, groups: Sequence[Sequence[Response]] = groups) -> float:
            return worst_difference(groups, model, params.temperature, PROMPTS, params.watch_ids)

        assert worst(model) < 1e-4
        assert previous is None or worst(previous) > 0.1
        assert {r.weight_version for g in groups for r in g} == {version}
        scored = engine.branch_logprobs(PROMPTS, [Branch((), (40, 5, 300))])
        with torch.no_grad():
            exact = torch.stack([model(torch.tensor([p])).logits[0, -1].log_softmax(-1)[[40, 5, 300]] for p in PROMPTS])
        torch.testing.assert_close(scored, exact, atol=1e-4, rtol=0)
        previous = model


TREE = ScoreTree([[[40]], [[40, 5]], [[40, 300, 17]], [[6, 9]], [[6, 300]]], [EOS])


def check_branches(engine: RolloutEngine, config: PretrainedConfig) -> None:
    """The log-probs behind each branch of a tree are those of the whole text, and none are of another sequence."""
    model = policy(config, 3)
    engine.update_weights(model.named_parameters(), 3)
    scored = engine.branch_logprobs(PROMPTS, TREE.branches)
    for prompt, row in zip(PROMPTS, scored, strict=True):
        with torch.no_grad():
            exact = [
                model(torch.tensor([[*prompt, *branch.path]])).logits[0, -1].log_softmax(-1)[list(branch.ids)]
                for branch in TREE.branches
            ]
        torch.testing.assert_close(row, torch.cat(exact), atol=1e-4, rtol=0)


def check_greedy(engine: RolloutEngine, config: PretrainedConfig, watch_ids: tuple[int, ...]) -> None:
    """Greedy responses are the most probable tokens, with log-probs at temperature 1."""
    model = policy(config, 2)
    engine.update_weights(model.named_parameters(), 2)
    groups = engine.generate(PROMPTS, SamplingParams(n=2, temperature=0, max_new_tokens=8, watch_ids=watch_ids))
    assert worst_difference(groups, model, 1, PROMPTS, watch_ids) < 1e-4
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert group[0].token_ids == group[1].token_ids
        with torch.no_grad():
            assert group[0].token_ids[0] == model(torch.tensor([prompt])).logits[0, -1].argmax()


def check_longest(engine: RolloutEngine, prompt: int, response: int) -> None:
    """A prompt of so many tokens gets a response of so many."""
    params = SamplingParams(n=2, max_new_tokens=response)
    for _ in range(20):
        (group,) = engine.generate([[40 + i for i in range(prompt)]], params)
        if any(r.finish_reason == "length" for r in group):
            break
    assert max(len(r.token_ids) for r in group) == response

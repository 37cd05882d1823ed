"""What is made of responses on the rank that sampled them, and what travels, in gloo worlds."""

import pytest
import torch

from real_megatron.batch.types import Trajectory
from real_megatron.rollout.sampled import Counts, SampledGroup, decode, encode
from tests.support import rollout_ranks as ranks
from tests.support.ranks import run_ranks

RESPONSES = len(ranks.DRAWN_PROMPTS) * ranks.DRAWN_PARAMS.n


def test_what_travels_comes_back_as_it_was() -> None:
    first = Trajectory([7, 200_000], 0, [True, False], [-0.5, 0.0], forced_anchor=True, weight_version=2**40)
    others = [Trajectory([3], None, [True], [-1.25], finish_reason=reason) for reason in ("length", "eos")]
    groups = [
        SampledGroup([first], Counts(1, 2, 3, 4, 5, 6, 7, 8)),
        SampledGroup(),
        SampledGroup(others, Counts(no_anchor=2)),
    ]
    message = encode(groups)
    assert decode(message) == groups and message.dtype == torch.uint8
    assert decode(encode([])) == []


@pytest.mark.parametrize("owned", [False, True], ids=["embedded", "servers"])
@pytest.mark.parametrize(("rule", "score"), [("force", True), ("drop", False)])
def test_ranks_sample_what_one_rank_samples(owned: bool, rule: str, score: bool) -> None:
    """To the bit, trajectories and metrics; each response is cut once. What a rank receives does not grow with the
    ranks: the trajectories of the others. With four ranks and three prompts one has nothing to do."""
    alone = ranks.sample(ranks.Drawn(), rule, score)
    kinds = {(t.forced_anchor, t.finish_reason) for group in alone.trajectories for t in group}
    assert kinds == ({(False, "stop")} if rule == "drop" else {(False, "stop"), (True, "length"), (True, "eos")})
    whole = encode([SampledGroup(group) for group in alone.trajectories]).numel()
    for world in (2, 4):
        results = run_ranks(world, ranks.sampled, owned, rule, score)
        assert all(sampled == alone for sampled, _, _ in results)
        assert sum(cuts for _, cuts, _ in results) == RESPONSES
        received = [count["received"] for _, _, count in results]
        # Each rank's message begins with the number of its groups.
        assert received == [0, *[whole] * (world - 1)] if owned else max(received) <= whole + 8 * (world - 1)
        assert all(count["header"] < 200 for _, _, count in results)


@pytest.mark.parametrize("owned", [False, True], ids=["embedded", "servers"])
@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({"refused": (5, 3)}, ("PromptRefused", 1, "too long")),
        ({"refused_behind": (3,)}, ("PromptRefused", 2, "too long")),
        ({"nan": (3,)}, ("BadResponse", 2, "log-probabilities that are not finite for prompt 2: its weights are")),
    ],
)
def test_an_error_names_the_prompt_of_the_whole_call_on_every_rank(owned: bool, faults: dict, error: tuple) -> None:
    for kind, index, text in run_ranks(2, ranks.sampling_errors, owned, faults):
        assert (kind, index) == error[:2] and error[2] in text


def test_damaged_weights_count_more_than_a_refused_prompt() -> None:
    """Otherwise the caller would go on without the prompt. The ranks have one fault each."""
    errors = run_ranks(2, ranks.sampling_errors, False, {"nan": (3,), "refused": (5,)})
    assert [(kind, index) for kind, index, _ in errors] == [("BadResponse", 2)] * 2

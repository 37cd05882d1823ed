"""A training run with rollouts from a real server, watched from inside.

    python -m tests.support.rollout_training CONFIG.yaml RECORD.json [KILLED_STEP UNFLUSHED_STEP]

KILLED_STEP: the server is killed while it serves this step's batch; UNFLUSHED_STEP: before this step's sync the same
weights are sent once without dropping the server's cache (both counted from 0).

Dropping the cache is told apart for SGLang alone. A process of its own, so that a hang can be ended from outside. The
loop, the policy, the engine and the server are the real ones; around their methods stand checks that write what they
see into RECORD.json.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from real_megatron.batch.types import Group
from real_megatron.config import RunConfig
from real_megatron.objective import ReinforceObjective
from real_megatron.policy.policy import Policy
from real_megatron.rollout.engine import SamplingParams
from real_megatron.rollout.remote.engine import RemoteEngine
from real_megatron.rollout.sampling import sample_trajectories
from real_megatron.rollout.sglang.control import Control
from real_megatron.rollout.sglang.engine import SGLangEngine
from real_megatron.rollout.vllm.engine import VLLMEngine
from real_megatron.training import rl
from real_megatron.training.session import Session

REPLIES_BEFORE_KILL = 2
ENGINES: dict[str, type[RemoteEngine]] = {"sglang": SGLangEngine, "vllm": VLLMEngine}


class Watch:
    """What the checks saw."""

    def __init__(self, killed_step: int | None, unflushed_step: int | None) -> None:
        self.syncs: list[dict] = []
        self.asked: list[list[str]] = []
        self.steps: list[dict] = []
        self.unflushed: float | None = None
        self.starts = 0
        self.pids: list[int] = []
        self._killed_step = killed_step
        self._unflushed_step = unflushed_step
        self._kill_after: int | None = None

    def run(self, config: RunConfig) -> None:
        """Train, with this watch around the loop's own methods."""
        publish, generate, train_step = Session.publish, rl.generate, Policy.train_step
        kind = ENGINES[config.rollout.engine]
        parse = kind._parse_generation

        def watched_publish(session: Session, step: int) -> None:
            if step == self._unflushed_step and self.unflushed is None:
                with unflushed():
                    session.engine.update_weights(session.policy.export(), version=step)
                self.unflushed = probe(session)
            publish(session, step)
            self.syncs.append({"step": step, "worst": probe(session)})
            process = session.engine._pool.replicas[0].process
            self.starts = process.starts
            if process.pid not in self.pids:
                self.pids.append(process.pid)

        def watched_generate(session: Session, objective: ReinforceObjective, number: int) -> rl.Batch:
            self.asked.append([session.groups[i].example_id for i in session.order.batch(number)])
            self._kill_after = REPLIES_BEFORE_KILL if number == self._killed_step else None
            return generate(session, objective, number)

        def watched_parse(engine: RemoteEngine, reply, replica, params):
            responses = parse(engine, reply, replica, params)
            if self._kill_after is not None:
                self._kill_after -= 1
                if self._kill_after == 0:
                    os.killpg(replica.process.pid, signal.SIGKILL)
            return responses

        def watched_train_step(policy: Policy, groups: Sequence[Group], objective):
            self.steps.append(
                {
                    "worst": difference(policy, groups),
                    "responses": [len(group.trajectories) for group in groups],
                    "examples": [group.example_id for group in groups],
                    "versions": sorted({t.weight_version for group in groups for t in group.trajectories}),
                }
            )
            return train_step(policy, groups, objective)

        with (
            mock.patch.object(Session, "publish", watched_publish),
            mock.patch.object(rl, "generate", watched_generate),
            mock.patch.object(kind, "_parse_generation", watched_parse),
            mock.patch.object(Policy, "train_step", watched_train_step),
        ):
            rl.train(config)


def probe(session: Session) -> float:
    """Sample the same few prompts, which are therefore in the prefix cache, and compare with the policy: the sampled
    tokens' log-probs, and the score distribution behind each response."""
    prompts = [group.prompt_ids for group in session.groups[:4]]
    params = SamplingParams(n=2, max_new_tokens=session.config.data.max_response_tokens)
    sampled = sample_trajectories(session.engine, session.tokenizer, session.scale, prompts, params, "force")
    groups = [Group(prompt, t, label=1.0) for prompt, t in zip(prompts, sampled.trajectories, strict=True)]
    worst = difference(session.policy, groups)
    sequences = [group.prompt_ids + t.response_ids for group in groups for t in group.trajectories]
    served = session.engine.branch_logprobs(sequences, session.policy.tree.branches)
    exact = torch.tensor([t.scores for row in session.policy.logprobs(groups) for t in row])
    return max(worst, (served - exact).abs().max().item())


def difference(policy: Policy, groups: Sequence[Group]) -> float:
    """Largest |log π of the engine − log π of the policy| over all sampled tokens."""
    gaps = [0.0]
    for group, row in zip(groups, policy.logprobs(groups), strict=True):
        for trajectory, exact in zip(group.trajectories, row, strict=True):
            served = [p for p, sampled in zip(trajectory.old_logprobs, trajectory.loss_mask, strict=True) if sampled]
            gaps += [abs(a - b) for a, b in zip(served, exact.tokens, strict=True)]
    return max(gaps)


@contextmanager
def unflushed() -> Iterator[None]:
    """Syncs that leave the server's prefix cache as it is."""
    post = Control.post

    async def without_flush(control: Control, replica, path: str, body: dict) -> dict:
        if path == "/flush_cache":
            return {}
        return await post(control, replica, path, body | {"flush_cache": False} if "flush_cache" in body else body)

    with mock.patch.object(Control, "post", without_flush):
        yield


def main() -> None:
    config, record = RunConfig.from_yaml(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    watch = Watch(*map(int, sys.argv[3:])) if sys.argv[3:] else Watch(None, None)
    watch.run(config)
    fields = {name: value for name, value in vars(watch).items() if not name.startswith("_")}
    record.write_text(json.dumps(fields), encoding="utf-8")


if __name__ == "__main__":
    main()

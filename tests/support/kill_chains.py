"""Runs that are killed again and again, each time at a random point of a phase, and then left to finish."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.support.kills import Run, check_left, differences, result_of

CHAIN = 4
"""Kills of one run at most, before it is left to finish."""


@dataclass
class Tally:
    """What came of all kills of one phase at one number of ranks."""

    phase: str
    ranks: int
    kills: int = 0
    points: set[tuple[int, float]] = field(default_factory=set)
    """(step that the start resumed from, seconds into the phase)"""
    resumed: list[int] = field(default_factory=list)
    """The step that the next start resumed from, for each kill."""
    chains: int = 0
    """Runs that were killed again and again, and then finished: all of them as they have to be."""
    worst_gone_s: float = 0.0
    by_agent: int = 0

    def row(self) -> str:
        """Of the table in docs/surviving.md."""
        steps = ", ".join(f"{step}: {self.resumed.count(step)}" for step in sorted(set(self.resumed)))
        return (
            f"| {self.phase} | {self.ranks} | {self.kills} | {len(self.points)} | {steps} | {self.chains} of "
            f"{self.chains} | {self.worst_gone_s:.1f} | {self.by_agent} |"
        )


def bit_identical(whole: Run) -> Callable[[Run], list[str]]:
    """The check of a finished run: what of it is not as in `whole`, which nobody has disturbed."""
    expected = result_of(whole)
    return lambda run: differences(result_of(run), expected)


def kill_often(
    run: Run,
    whole: Run,
    phases: Sequence[str],
    seed: int,
    chain: int = CHAIN,
    faults: Callable[[Run], list[str]] | None = None,
    left: Callable[[Run], None] = lambda run: None,
) -> Tally:
    """Kill `run` once in each of `phases` at a random point, letting it go on after each, and let it finish after
    `chain` kills.

    whole: the same run, undisturbed; its phases tell how long each takes
    faults: what is wrong with a finished run, `bit_identical(whole)` by default
    left: a further check of what each kill has left

    Fails where anything is wrong.
    """
    count = len(phases)
    draw, tally = random.Random(f"{phases} {run.ranks} {seed}"), Tally(phases[0], run.ranks)
    seconds = {name: list(times) for name, times in whole.report()["seconds"].items()}
    faults = faults or bit_identical(whole)
    done = in_chain = 0

    def finished(told: str) -> None:
        nonlocal done, in_chain
        wrong = faults(run)
        assert not wrong, told + "\n" + "\n".join(wrong)
        seconds["resume"] += run.report()["seconds"]["resume"]
        tally.chains, done, in_chain = tally.chains + 1, 0, 0
        run.forget()

    while tally.kills < count:
        phase = phases[tally.kills]
        if phase == "resume" and not done:
            done = _stopped_after(run, draw.randrange(1, run.config.steps + 1))
        times = seconds[phase] or seconds["start"]  # before the first resumed run has ended
        where = {
            "phase": phase,
            "occurrence": draw.randrange(_still_to_come(phase, seconds, run.config.steps, done)),
            "after": draw.random() * sorted(times)[len(times) // 2],
        }
        victims = draw.choice([[rank] for rank in range(run.ranks)] + [list(range(run.ranks))])
        end = run.start(where, victims)
        told = f"{where}, ranks {victims}, kill {tally.kills} of seed {seed}: {end}"
        if end.codes == [0] * run.ranks:  # what was left to do has not come so far
            finished(f"finished; {told}")
            continue
        assert all(end.codes[rank] == -9 for rank in victims), f"{told}\n{run.log()[-6000:]}"
        assert not end.left, told
        try:
            before, done = done, check_left(run)
            assert done >= before, "a checkpoint is gone"
            left(run)
        except Exception as error:
            error.add_note(told)
            raise
        tally.kills += 1
        tally.points.add((done, where["after"]))
        tally.resumed.append(done)
        tally.worst_gone_s = max(tally.worst_gone_s, end.gone_s)
        tally.by_agent += end.ended_by_agent
        in_chain += 1
        if in_chain == chain or tally.kills == count:
            run.finish()
            finished(f"after {in_chain} kills in {phase}, kill {tally.kills} of seed {seed}")
    return tally


def _still_to_come(phase: str, seconds: dict[str, list[float]], steps: int, done: int) -> int:
    """How often a phase comes at least in a start behind `done` steps: once a step, the export at the end, the starts
    at the beginning; what is sent, some buckets for the weights after each step and those before the first."""
    if phase in ("start", "resume", "export"):
        return 1
    if phase == "send":
        return len(seconds["send"]) // (steps + 1) * max(1, steps - done)
    return max(1, steps - done)


def _stopped_after(run: Run, steps: int) -> int:
    """Bring a new run to its checkpoint after so many steps, and no further."""
    last = steps == run.config.steps
    where = {"phase": "export", "occurrence": 0} if last else {"phase": "rollout", "occurrence": steps}
    end = run.start(where, range(run.ranks))
    assert end.codes == [-9] * run.ranks and not end.left, f"{end}\n{run.log()[-6000:]}"
    assert (done := check_left(run)) == steps
    return done

"""The whole examination, and its report."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from real_megatron.config import RunConfig
from real_megatron.doctor import fast_paths, machine, packages, requirements
from real_megatron.doctor.environment import TIMEOUT_S, describe_end
from real_megatron.doctor.finding import Finding, State, guarded

STYLES: dict[State, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}


def examine(config: RunConfig, python: str) -> list[Finding]:
    """Everything that can be told of this machine. Imports of other packages happen in processes of their own.

    python: of the environment that servers run in; empty: they are not looked at
    """
    with ThreadPoolExecutor() as pool:
        paths = pool.submit(_fast_paths, config)
        served = pool.submit(_servers, config, python)
        own = pool.submit(_packages_and_machine)
        found = [*own.result(), *paths.result(), *served.result()]
    topics = {topic: index for index, topic in enumerate(dict.fromkeys(one.topic for one in found))}
    return sorted(found, key=lambda one: topics[one.topic])


def _packages_and_machine() -> list[Finding]:
    def look() -> Iterator[Finding]:
        accepted = requirements.required()
        environment = packages.trainer(accepted)
        yield from packages.trainer_findings(environment, accepted)
        yield from machine.findings(environment)

    return list(guarded(packages.TOPIC, "packages", look))


def _servers(config: RunConfig, python: str) -> list[Finding]:
    if not python:
        return []
    wanted = config.rollout.engine if config.rollout.engine in packages.SERVERS else "sglang"
    return list(guarded("servers", "Python", lambda: packages.server_findings(python, wanted)))


def _fast_paths(config: RunConfig) -> list[Finding]:
    """As `fast_paths.findings`, from a process of its own."""
    command = [sys.executable, "-m", "real_megatron.doctor.fast_paths"]
    try:
        done = subprocess.run(
            command,
            input=config.model_dump_json(),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT_S,
        )
        output, end = done.stdout, describe_end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        end = f"not done in {TIMEOUT_S} s"
    lines = [json.loads(line) for line in output.splitlines() if line.endswith(("}", '"'))]
    found = [Finding(**line) for line in lines if isinstance(line, dict)]
    if "done" not in lines:
        last = found[-1].name if found else "the first import"
        found.append(
            Finding(fast_paths.TOPIC, "checks", "broken", f"ended behind {last}: {end}", "see the packages above")
        )
    return found


def table(findings: Sequence[Finding], title: str) -> Table:
    """The findings for a terminal or a file; what is to be done stands below what was found."""
    rows = Table(title=title, show_header=False)
    rows.add_column(style="bold")
    rows.add_column()
    rows.add_column()
    rows.add_column(overflow="fold")
    topic = ""
    for one in findings:
        if one.topic != topic:
            rows.add_section()
        shown = escape(one.text) + (f"\n→ {escape(one.fix)}" if one.fix else "")
        state = f"[{STYLES[one.state]}]{one.state}[/]"
        rows.add_row("" if one.topic == topic else escape(one.topic), escape(one.name), state, shown)
        topic = one.topic
    return rows


def as_json(findings: Sequence[Finding]) -> str:
    """The findings for machines."""
    counts = {state: sum(one.state == state for one in findings) for state in STYLES}
    return json.dumps({"findings": [asdict(one) for one in findings], **counts}, indent=2)


def is_broken(findings: Sequence[Finding]) -> bool:
    """Whether something required does not work."""
    return any(one.state == "broken" for one in findings)

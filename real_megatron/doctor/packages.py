"""What is installed: Python, what training needs, what makes it faster, what servers run."""

import platform
import sys
from collections.abc import Iterator, Mapping

from real_megatron.doctor import requirements
from real_megatron.doctor.environment import Environment, Package, look
from real_megatron.doctor.finding import Finding, State
from real_megatron.version import VERSION

TOPIC = "packages"
SHOWN = ("torch", "megatron-core", "transformers")
"""Required packages with a line of their own; of the others, those with a fault get one."""
OPTIONAL = {"transformer-engine": "faster layers, grouped experts, fused Adam", "apex": "fused Adam"}
SERVERS = ("torch", "transformers", "sglang", "vllm")
TOO_NEW_WORKS = ("megatron-core",)
"""Where a version beyond the range is tried all the same (policy/megatron_versions.py)."""


def trainer(accepted: Mapping[str, str]) -> Environment:
    """This Python, with all that is required and what is optional. accepted: of `requirements.required`"""
    return look({name: requirements.module_of(name) for name in [*accepted, *OPTIONAL]})


def trainer_findings(found: Environment, accepted: Mapping[str, str]) -> Iterator[Finding]:
    """Lines on the trainer's environment."""
    python, accepts = platform.python_version(), requirements.python_range()
    fits = not accepts or requirements.fits(python, accepts) == "yes"
    fix = "" if fits else f"install a Python {accepts}, and an environment with it: bash tools/setup_env.sh"
    text = f"{python}, {sys.executable}{'' if fits else f': {accepts} is needed'}"
    yield Finding(TOPIC, "Python", "ok" if fits else "broken", text, fix)
    yield Finding(TOPIC, "real_megatron", "ok", f"{VERSION}, {requirements.ROOT / 'real_megatron'}")
    if found.error:
        yield Finding(TOPIC, "imports", "broken", f"cannot be tried: {found.error}")
        return
    fine = 0
    for name, versions in accepted.items():
        one = judged(found.packages[name], versions)
        fine += one.state == "ok" and name not in SHOWN
        if one.state != "ok" or name in SHOWN:
            yield one
    yield Finding(TOPIC, "others", "ok", f"{fine} more required packages are there, in the accepted versions")
    for name, gives in OPTIONAL.items():
        yield optional(found.packages[name], gives)


def judged(package: Package, accepted: str) -> Finding:
    """A required package against the range that is accepted."""
    name = package.distribution
    install = f'pip install "{name}{accepted}"'
    if not package.there:
        return Finding(TOPIC, name, "broken", f"not installed; {accepted or 'any version'} is needed", install)
    text = package.version
    if name == "torch" and not package.error:
        text += f", {of_torch(package)}"
    if package.error:
        return Finding(
            TOPIC, name, "broken", f"{text or 'installed'}, but not to be imported: {package.error}", install
        )
    where = requirements.fits(package.version, accepted)
    if where == "yes":
        return Finding(TOPIC, name, "ok", text)
    if where == "new" and name in TOO_NEW_WORKS:
        return Finding(TOPIC, name, "warning", f"{text}: newer than what has been tried, {accepted}", install)
    return Finding(TOPIC, name, "broken", f"{text}: too {where}, {accepted} is needed", install)


def of_torch(package: Package) -> str:
    """CUDA and NCCL of a torch, for a sentence."""
    cuda, nccl = package.more.get("cuda"), package.more.get("nccl")
    return f"CUDA {cuda}, {f'NCCL {nccl}' if nccl else 'no NCCL'}" if cuda else "built for the CPU"


def optional(package: Package, gives: str) -> Finding:
    """A package that makes training faster. One that is installed and does not import stops a run where it is used."""
    name = package.distribution
    install = requirements.install_transformer_engine() if name == "transformer-engine" else ""
    if not package.there:
        return Finding(TOPIC, name, "note", f"not installed: {gives}", install)
    if package.error:
        remedy = f"pip uninstall {name}" + (f", or {install}" if install else "")
        return Finding(TOPIC, name, "warning", f"{package.version}, but not to be imported: {package.error}", remedy)
    return Finding(TOPIC, name, "ok", package.version)


def server_findings(python: str, wanted: str) -> Iterator[Finding]:
    """Lines on the environment of servers. wanted: the package that they run"""
    found, topic = look({name: name for name in dict.fromkeys([*SERVERS, wanted])}, python), "servers"
    if found.error:
        fix = f"set rollout.python to the Python of the environment that has {wanted}"
        yield Finding(topic, "Python", "broken", f"{python} does not run: {found.error}", fix)
        return
    yield Finding(topic, "Python", "ok", f"{found.python}, {found.executable}")
    for name, package in found.packages.items():
        install = f"{python} -m pip install {name}"
        if not package.there:
            if name in ("torch", "transformers", wanted):
                yield Finding(topic, name, "broken", "not installed", install)
        elif package.error:
            state: State = "broken" if name in ("torch", "transformers", wanted) else "note"
            yield Finding(topic, name, state, f"{package.version}, but not to be imported: {package.error}", install)
        else:
            text = f"{package.version}, {of_torch(package)}" if name == "torch" else package.version
            yield Finding(topic, name, "ok", text)

"""Imports packages in the Python that runs this file, and prints a JSON line about each, as they come.

    python real_megatron/doctor/probe.py torch=torch megatron.core=megatron-core …       (MODULE=DISTRIBUTION)

Standard library only, since it also runs in the environment of servers. An import may end the whole process: the line
that does not come says which one.
"""

import importlib
import importlib.util
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))


def about_torch(torch: Any) -> dict[str, Any]:
    """What torch says of CUDA and NCCL."""
    found = {"cuda": torch.version.cuda or "", "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    try:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception:  # a build without NCCL has none
        found["nccl"] = ""
    return found


def stand_in_for_kernels() -> None:
    """Where torch has no GPU, SGLang imports only as rollout/remote/launcher/launch.py starts it there."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        launcher = os.path.join(FOLDER, "..", "rollout", "remote", "launcher")
        sys.path.insert(0, launcher)
        importlib.import_module("sglang_cpu_shim")
        sys.path.remove(launcher)


def about(module: str, distribution: str) -> dict[str, Any]:
    """Version and state of one package; `there` is false where it is not installed."""
    found: dict[str, Any] = {"module": module, "distribution": distribution, "version": "", "there": True, "error": ""}
    try:
        found["version"] = version(distribution)
    except PackageNotFoundError:
        pass
    try:
        if importlib.util.find_spec(module) is None:
            return {
                **found,
                "there": bool(found["version"]),
                "error": "no module " + module if found["version"] else "",
            }
        if module == "sglang":
            stand_in_for_kernels()
        loaded = importlib.import_module(module)
        found["version"] = found["version"] or str(getattr(loaded, "__version__", ""))
        if module == "torch":
            found.update(about_torch(loaded))
    except BaseException as error:  # whatever it is, it is what is asked for
        if (
            isinstance(error, ModuleNotFoundError)
            and module.startswith((error.name or " ") + ".")
            and not found["version"]
        ):
            return {**found, "there": False}
        found["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return found


def main() -> None:
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != FOLDER]  # its modules are no packages
    # What packages print goes elsewhere.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({"python": platform.python_version(), "executable": sys.executable}), file=lines, flush=True)
    for argument in sys.argv[1:]:
        module, _, distribution = argument.partition("=")
        print(json.dumps(about(module, distribution)), file=lines, flush=True)
    os._exit(0)  # a package's own end could be another crash


if __name__ == "__main__":
    main()

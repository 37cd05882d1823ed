"""Runs a server module and ends it when the parent does: `python launch.py sglang.launch_server --model-path …`.

A script for the server's own environment; needs nothing of real_megatron. The parent holds our standard input open;
when it closes, however the parent died, the whole process group is killed, so that no server is left behind holding
memory. Processes that the server spawns import this file again, therefore the shim for machines without a GPU is at the
top.
"""

import os
import runpy
import signal
import sys
import threading

if ("--device", "cpu") in zip(sys.argv, sys.argv[1:], strict=False):
    import sglang_cpu_shim  # noqa: F401


def _end_with_parent() -> None:
    # Not through sys.stdin: its lock, held while it reads, would stop every process that the server forks.
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=False)

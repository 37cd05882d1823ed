"""Runs a server module and ends it when the parent does: `python launch.py sglang.launch_server --model-path …`.

A script for the server's own environment; needs nothing of real_megatron. The parent holds our standard input open;
when it closes, however the parent died, the whole process group is killed, so that no server is left behind holding
memory. Processes that the server spawns import this file again, therefore the shim for machines without a GPU is at the
top, and what keeps the API key out of the log.

The API key that LAUNCH_API_KEY holds, if any, becomes the server's argument --api-key: inside this process only, since
every user of the machine can read the command line that a process was started with.
"""

import logging
import os
import runpy
import signal
import sys
import threading

if ("--device", "cpu") in zip(sys.argv, sys.argv[1:], strict=False):
    import sglang_cpu_shim  # noqa: F401


KEY = os.environ.get("LAUNCH_API_KEY", "")


def _keep_out_of_logs(key: str) -> None:
    """SGLang logs its arguments, and logs are read by others than who has started the server."""
    make = logging.getLogRecordFactory()

    def record(*args, **kwargs):
        made = make(*args, **kwargs)
        if key in f"{made.msg}{made.args}":
            made.msg, made.args = made.getMessage().replace(key, "[API key]"), ()
        return made

    logging.setLogRecordFactory(record)


if KEY:
    _keep_out_of_logs(KEY)


def _end_with_parent() -> None:
    # Not through sys.stdin: its lock, held while it reads, would stop every process that the server forks.
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module = sys.argv.pop(1)
    if KEY:
        sys.argv += ["--api-key", KEY]
    runpy.run_module(module, run_name="__main__", alter_sys=False)

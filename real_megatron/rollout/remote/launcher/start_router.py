"""Starts sglang-router with the arguments of its own command line: `python launch.py start_router --host …`.

Runs in the servers' own environment; needs nothing of real_megatron. Not sglang_router.launch_router, which imports
torch and all of sglang for a balancer that is not used here.
"""

import argparse
import os
import signal

from sglang_router.router import Router
from sglang_router.router_args import RouterArgs


def _end_with_parent() -> None:
    """As launch.py's thread of this name, in a process: the router never lets go of Python's lock, so that no thread of
    Python runs beside it."""
    if os.fork() == 0:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    parser = argparse.ArgumentParser()
    RouterArgs.add_cli_args(parser)
    Router.from_args(RouterArgs.from_cli_args(parser.parse_args())).start()

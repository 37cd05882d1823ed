"""The command line in a process of tests."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_logging() -> Iterator[None]:
    """Commands set up the logging of their process, which here is that of other tests too."""
    root, torch_extension = logging.getLogger(), logging.getLogger("torch.utils.cpp_extension")
    handlers, levels = list(root.handlers), (root.level, torch_extension.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    torch_extension.setLevel(levels[1])

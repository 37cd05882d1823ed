"""A pytest plugin that runs existing tests with every model built on HybridModel, in this process and on ranks.

`python -m pytest -p tests.support.hybrid_plugin tests/policy/test_policy.py tests/bridge/test_layouts.py`
"""

from collections.abc import Callable
from typing import Any

import pytest


def on_hybrid(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, with every model that it builds built on HybridModel."""
    from real_megatron.policy import model
    from real_megatron.policy.hybrid import HybridJudgeModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_judge_class", lambda config: HybridJudgeModel)
        return fn(*args)


def pytest_configure(config: pytest.Config) -> None:
    """Run the functions of all tests' ranks by `on_hybrid`."""
    from tests.support import ranks

    run_ranks = ranks.run_ranks
    ranks.run_ranks = lambda world_size, fn, *args: run_ranks(world_size, on_hybrid, fn, *args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """What a test builds in its own process as well."""
    from real_megatron.policy import model
    from real_megatron.policy.hybrid import HybridJudgeModel

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_judge_class", lambda config: HybridJudgeModel)
        return (yield)

"""A module of a user's own that brings an engine: `rollout.engine: tests.support.rollout_own_engine:scripted`."""

from real_megatron.rollout.engine import EngineSpec, Response, register_engine
from tests.support.rollout_fakes import ScriptedEngine


@register_engine("scripted")
def build(spec: EngineSpec) -> ScriptedEngine:
    """An engine whose one response is as long as the specification allows."""
    length = spec.max_response_tokens
    return ScriptedEngine([[Response([7] * length, [-1.0] * length, "length", 0)]])


def unregistered(spec: EngineSpec) -> ScriptedEngine:
    return ScriptedEngine()

import sys

import pytest

from real_megatron.bridge.families import FAMILIES


@pytest.fixture
def extension_family(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that registers a family when it is imported; the registry is as before afterwards."""
    name = "tests.support.extension_family"
    monkeypatch.setattr(FAMILIES, "_known", {family: FAMILIES[family] for family in FAMILIES})
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name

"""SGLang, or what stands in for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from sglang_modules import VARIABLE, importable_sglang

from unmask.integrations.sglang import register


@pytest.fixture(params=["stub", *(["released"] if VARIABLE in os.environ else [])])
def sglang(request: pytest.FixtureRequest) -> Iterator[str]:
    """``import sglang`` works, and the algorithm is registered as the plugin registers it; which sglang it is."""
    with importable_sglang(request.param):
        register()
        yield request.param

"""SGLang for every test here that asks for it: the stand-in always, the released package where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sglang_modules import VARIABLE, importable_sglang, released_is_here

RELEASED = pytest.param(
    "released",
    marks=pytest.mark.skipif(
        not released_is_here(), reason=f"{VARIABLE} does not name a wheel or folder of sglang 0.5.23"
    ),
)


@pytest.fixture(params=["stub", RELEASED])
def sglang(request: pytest.FixtureRequest) -> Iterator[str]:
    """``import sglang`` works, and the algorithm is registered as the plugin registers it; which sglang it is."""
    with importable_sglang(request.param):
        from unmask.serving.sglang import register

        register()
        yield request.param


@pytest.fixture(params=[True, False], ids=["fdfo", "sync"])
def fdfo(request: pytest.FixtureRequest) -> bool:
    """Both of SGLang's modes."""
    return request.param

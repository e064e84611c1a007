"""What is freed stays in the process while a command runs."""

from __future__ import annotations

import platform

import pytest
from fresh_process import run_python

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_malloc_keeps_what_is_freed_unless_the_user_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    code = "from unmask.cli.memory import keep_freed_memory; print(keep_freed_memory())"
    assert run_python(code).stdout.strip() == "True"
    for name, value in zip(SETTINGS, ("131072", "131072", "glibc.malloc.arena_max=4"), strict=True):
        assert run_python(code, **{name: value}).stdout.strip() == "False"

"""What the sandbox keeps a program from beyond its limits: the kernel's calls, the judge, the verdict."""

from __future__ import annotations

import os
import resource

import pytest

from unmask.tasks import execution
from unmask.tasks.execution import SandboxError, run_tests


@pytest.fixture(autouse=True)
def sandbox() -> None:
    try:
        run_tests("", "")
    except SandboxError:
        pytest.skip("no namespaces on this system")


KERNEL = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None, use_errno=True)
def denied(number, *arguments):
    return libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == 1
def f():
    left = []
    machine = os.uname().machine
    calls = {
        "x86_64": (29, 68, 64, 240, 319, 206, 272, 248, 249, 250),
        "aarch64": (194, 186, 190, 180, 279, 0, 97, 217, 218, 219),
    }
    left += [n for n in calls.get(machine, ()) if not denied(n, 0, 0, 0, 0, 0)]
    if machine in calls:
        if libc.prctl(4, 1, 0, 0, 0) == 0:
            left.append("dumpable")
        try:
            resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))
            left.append("limits of another process")
        except PermissionError:
            pass
        try:
            socket.socket(40, socket.SOCK_STREAM)
            left.append("vsock")
        except PermissionError:
            pass
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    a, b = socket.socketpair()
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return left
"""


def test_calls_that_reach_beyond_the_limits_are_denied() -> None:
    run = run_tests(KERNEL, "assert f() == [], f()")
    assert run.passed, run


INTERRUPTING = """
import os, signal
def f():
    os.kill(1, signal.SIGINT)
"""
INTERRUPTED = """
interrupted = False
try:
    f()
    f()
except KeyboardInterrupt:
    interrupted = True
assert not interrupted
"""


def test_the_tests_cannot_be_interrupted() -> None:
    run = run_tests(INTERRUPTING, INTERRUPTED)
    assert run.passed, run


FORGING = """
import os
for number in range(3, 6000):
    try:
        os.write(number, b'{"setup": "boom"}'.ljust(65536))
    except OSError:
        pass
def f():
    return 1
"""


def test_a_verdict_is_the_judges_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its descriptor is a large number; and what is no verdict is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 6000), hard))
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(4500)]
    try:
        run = run_tests(FORGING, "assert f() == 2")
        assert not run.passed
        assert "setup" not in run.reason
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for verdict in (b"[1]", b"{}", b'{"passed": true}', b"nonsense"):
        monkeypatch.setattr(execution, "supervise", lambda *_, verdict=verdict: (verdict, b"", False))
        assert run_tests("", "").reason == "ended without a verdict"


DEEP = """
import os
for _ in range(3000):
    os.mkdir("d")
    os.chdir("d")
def f():
    return 1
"""


def test_a_deep_folder_is_removed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(execution.tempfile, "tempdir", str(folder))
    folder.chmod(0o777)
    run = run_tests(DEEP, "assert f() == 1", weak=True)
    assert run.passed or "Error" in run.reason, run
    assert list(folder.iterdir()) == []

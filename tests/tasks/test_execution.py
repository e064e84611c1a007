"""Generated programs: those that solve the tests pass, those that cheat or attack score 0 and harm nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.tasks import execution
from unmask.tasks.execution import Execution, Limits, SandboxError, check_sandbox, pass_at_k, run_tests

TEST = "assert abs(f(1) - 2) + abs(f(5) - 6) == 0\n"
GOOD = "def f(x):\n    return x + 1\n"
QUICK = Limits(wall_seconds=20, cpu_seconds=1, memory=256 << 20, disk=8 << 20, file_size=4 << 20, processes=8)


@pytest.fixture
def sandbox() -> None:
    try:
        check_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def wrong(body: str, limits: Limits = QUICK, allow_unsandboxed: bool = False) -> Execution:
    """Run ``body`` at the start of a program whose function is wrong, so that only a cheat passes."""
    program = f"{body}\n\nif 'f' not in globals():\n    def f(x): return 0\n"
    run = run_tests(program, TEST, limits=limits, allow_unsandboxed=allow_unsandboxed)
    assert not run.passed
    return run


@pytest.mark.usefixtures("sandbox")
def test_right_programs_pass_and_wrong_ones_fail() -> None:
    assert run_tests(GOOD, TEST).passed
    run = run_tests("def f(x):\n    print('hello')\n    return 2\n", TEST)
    assert (run.passed, run.reason, run.output) == (False, "AssertionError: ", "hello\nhello\n")
    assert run_tests("", TEST).reason == "NameError: name 'f' is not defined"
    assert run_tests("def f(x:", TEST).reason.startswith("SyntaxError")
    assert run_tests("def f(x):\n    return [][x]", TEST).reason == "IndexError: list index out of range"
    assert run_tests("import numpy\ndef f(x): return int(numpy.add(x, 1))", TEST).passed
    long = f"s = {'x' * 200_000!r}\n"  # more than a pipe holds
    assert run_tests(long + GOOD, long + TEST).passed


@pytest.mark.usefixtures("sandbox")
def test_the_tests_see_the_programs_names_and_their_own() -> None:
    program = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Pair:
    a: int
def sum(a, b): return a * b
def len(x): return -1
def helper(): return 1
def main(): raise ValueError
if __name__ == "__main__": main()
"""
    tests = "def helper(): return 2\nassert Pair(3).a == 3 and helper() == 2 and len([1]) == 1 and sum(2, 5) == 10"
    assert run_tests(program, tests, ["sum"]).reason == ""
    assert run_tests(program, tests).reason == "TypeError: 'int' object is not iterable"


SEARCH = """
import gc, os, sys
found, frame = [sys.argv, os.environ, sys.stdin.read()], sys._getframe()
while frame:
    found += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
    frame = frame.f_back
for thing in (*found, *gc.get_objects()):
    for part in (*thing.values(), *thing) if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else [thing]:
        if isinstance(part, (bytes, str)) and len(part) < 200: print(part)
"""  # noqa: E501
CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit in the call": "def f(x):\n    import os; os._exit(0)",
    "raise in the call": "def f(x):\n    raise SystemExit(0)",
    "markers": "print('{\"passed\": true}\\nPASSED\\nOK\\n1 passed'); import os; os._exit(0)",
    "every descriptor": "import os\nfor d in range(9):\n    try: os.write(d, b'1')\n    except OSError: 0\nos._exit(0)",
    "closed descriptors": "import os; os.closerange(0, 64)",
    "patched assertions": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})",
    "patched exceptions": "import builtins\nbuiltins.BaseException = type('A', (Exception,), {})",
    "patched builtins": "import builtins\nfor n in ('exec', 'compile', 'dict', 'abs'):\n    setattr(builtins, n, lambda *a: 0)",  # noqa: E501
    "patched harness": "import __main__, os\nfor n in ('passes', 'main'): setattr(__main__, n, lambda *a: True)\nos.write = lambda *a: 1",  # noqa: E501
    "again": "import __main__; __main__.main()",
}


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_nothing(name: str) -> None:
    wrong(CHEATS[name])


@pytest.mark.usefixtures("sandbox")
def test_the_token_is_in_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution.secrets, "token_bytes", lambda size: b"a secret token".ljust(size))
    assert "a secret token" not in wrong(SEARCH, replace(QUICK, output=1 << 24)).output
    forged = f"import os, sys\nos.write(int(sys.argv[1]), {b'a secret token'.ljust(32)!r})\nos._exit(0)"
    assert run_tests(forged, TEST).passed  # who knows the token passes


HOGS = {
    "memory": ("x = bytearray(1 << 30)", "MemoryError"),
    "disk": ("for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))", "OSError: [Errno 28]"),
    "one file": ("open('x', 'wb').write(bytes(5 << 20))\nopen('y', 'wb').write(bytes(5 << 20))", "OSError"),
    "open files": ("x = [open('/dev/null') for _ in range(1000)]", "OSError: [Errno 24]"),
    "processor": ("while True: pass", "ended without a verdict"),
    "sleep": ("import time; time.sleep(60)", "took longer than 2 s"),
    "recursion": ("def f(x): return f(x)", "RecursionError"),
    "output": ("while True: print('x' * 1000)", "OSError"),
    "input": ("input()", "EOFError"),
    "long reason": ("raise ValueError('é' * 10**6)", "ValueError: é"),
}


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", HOGS)
def test_hogs_are_stopped(name: str) -> None:
    body, reason = HOGS[name]
    run = wrong(body, replace(QUICK, wall_seconds=2 if name == "sleep" else 20))
    assert run.reason.startswith(reason)
    assert len(run.output) == (QUICK.output if name == "output" else 0)


@pytest.mark.usefixtures("sandbox")
def test_nothing_outside_is_seen_or_changed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    tmp_path.chmod(0o777)
    # What an interpreter below /tmp needs is there too.
    shown = {
        parts[2]
        for parts in (Path(p).parts for p in (*sys.path, sys.prefix, sys.base_prefix))
        if parts[1:2] == ("tmp",)
    }
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as local:
        listener.bind(("127.0.0.1", 0))
        local.bind(f"\0unmask-test-{os.getpid()}")
        for server in (listener, local):
            server.listen()
        run = wrong(f"""
import os, shutil, signal, socket, sys
for path in ({str(tmp_path)!r}, {str(Path(__file__))!r}, {str(Path.home())!r} + "/.bashrc", "/etc/passwd", "/proc/1", "/var"):
    if os.path.exists(path): print("saw", path)
for path in ({str(tmp_path)!r}, "", "/usr", "/dev", "/etc", sys.prefix, sys.base_prefix):
    try: open(path + "/new", "w").write("x"); print("wrote", path)
    except OSError: pass
for root in ("/", "/usr", sys.prefix): shutil.rmtree(root + "/bin", ignore_errors=True)
for command in ("mount -o remount,rw /usr", "umount /usr", "mount -t tmpfs x /tmp"):
    if os.system(command + " 2>/dev/null") == 0: print(command)
for family, address in ((socket.AF_INET, {listener.getsockname()!r}), (socket.AF_UNIX, {local.getsockname()!r})):
    try: socket.socket(family).connect(address); print("connected")
    except OSError: pass
for pid in ({os.getpid()}, {sleeper.pid}):
    try: os.kill(pid, 9); print("killed", pid)
    except OSError: pass
open("note", "w").write("mine")
print([n for n in os.listdir(".") if n not in {shown!r}], os.environ["HOME"] == os.getcwd() == os.environ["TMPDIR"], os.getuid() != 0, os.getgroups())
os.kill(-1, signal.SIGKILL)
""")  # noqa: E501
    assert run.output in (f"['note'] True True [{group}]\n" for group in ("", os.getgid(), "65534"))
    assert (tmp_path / "precious").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert Path(sys.prefix, "bin").is_dir()
    assert sleeper.poll() is None
    sleeper.kill()
    sleeper.wait()


def running(mark: str) -> bool:
    """Whether a process with ``mark`` among its arguments still runs two seconds from now, when all have had time."""
    deadline = time.monotonic() + 2
    while found := subprocess.run(["pgrep", "-f", mark], capture_output=True).returncode == 0:
        if time.monotonic() > deadline:
            break
    return found


BOMB = """
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.{leave}
            os.execvp("sleep", ["{mark}", "60"])
        made += 1
    except OSError: break
time.sleep(0.2)
print(made)
"""


@pytest.mark.usefixtures("sandbox")
def test_forks_are_bounded_and_do_not_survive() -> None:
    mark = f"unmask-test-{os.getpid()}-{time.time_ns()}"
    assert 1 <= int(wrong(BOMB.format(mark=mark, leave="setsid()")).output) <= QUICK.processes
    assert not running(mark)


def test_without_a_sandbox_there_are_limits_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"bubblewrap \(bwrap\) is not installed; .*allow_unsandboxed=True"):
        run_tests(GOOD, TEST)
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: No permissions to create new namespace\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(SandboxError, match="no sandbox to run programs in: bwrap: No permissions to create new name"):
        check_sandbox()
    assert check_sandbox(allow_unsandboxed=True) is None
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    descriptors = len(os.listdir("/proc/self/fd"))
    assert run_tests(GOOD, TEST, allow_unsandboxed=True).passed
    assert wrong("x = bytearray(1 << 30)", QUICK, True).reason.startswith("MemoryError")
    deep = "import os\nfor _ in range(1200):\n    os.mkdir('d')\n    os.chdir('d')"
    assert wrong(deep, Limits(), True).reason == "AssertionError: "
    mark = f"unmask-test-{os.getpid()}-{time.time_ns()}"
    for end in ("", "time.sleep(60)"):
        bomb = BOMB.format(mark=mark, leave="getpid()").replace("200", "3") + end
        assert wrong(bomb, replace(QUICK, wall_seconds=3), True).output == "3\n"
        assert not running(mark)
    assert list(scratch.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.usefixtures("sandbox")
@pytest.mark.skipif(os.geteuid() != 0, reason="starts a process as another user")
def test_the_sandbox_needs_no_root() -> None:
    bomb = "try: open('/new', 'w'); print('wrote')\nexcept OSError: pass\n" + BOMB.format(mark="x", leave="setsid()")
    code = (
        "from unmask.tasks.execution import Limits, run_tests\n"
        f"print(run_tests({GOOD!r}, {TEST!r}).passed)\n"
        f"print(run_tests({bomb!r}, '', limits=Limits(processes=8)).output, end='')"
    )
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            run = subprocess.run(
                [python, "-c", code], user=1234, group=1234, extra_groups=[], capture_output=True, text=True, cwd="/",
                env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"},
            )  # fmt: skip
        except OSError:  # not for other users
            continue
        if "namespace" in run.stderr or "ModuleNotFoundError" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        passed, made = run.stdout.splitlines()
        assert passed == "True"
        assert 1 <= int(made) <= 8
        return
    pytest.skip("no interpreter that other users may run, or no namespaces for them")


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="memory must be positive, got 0"):
        Limits(memory=0)


@pytest.mark.parametrize(
    ("samples", "correct", "k", "expected"),
    [
        (1, 1, 1, 1.0),
        (1, 0, 1, 0.0),
        (5, 2, 1, 0.4),
        (5, 2, 2, 0.7),  # 1 - C(3,2)/C(5,2) = 1 - 3/10
        (5, 2, 4, 1.0),  # four of five hold a correct one
        (10, 3, 5, 11 / 12),  # 1 - 21/252
        (10**5, 1, 1, 1e-5),
        (2000, 1, 1000, 0.5),
    ],
)
def test_pass_at_k(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, correct, k) == expected


@pytest.mark.parametrize(
    ("correct", "k", "message"),
    [
        (1, 6, "k must be between 1 and the 5 samples, got 6"),
        (1, 0, "k must be between 1 and the 5 samples, got 0"),
        (6, 1, "correct must be between 0 and the 5 samples, got 6"),
    ],
)
def test_pass_at_k_refuses_what_it_cannot_estimate(correct: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(5, correct, k)

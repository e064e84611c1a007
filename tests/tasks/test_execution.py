"""Generated programs: those that solve the tests pass, those that cheat or attack score 0 and harm nothing."""

from __future__ import annotations

import functools
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from unmask.tasks.execution import Execution, Limits, SandboxError, pass_at_k, run_tests

TEST = "assert f(1) == 2\nassert f(5) == 6\n"
GOOD = "def f(x):\n    return x + 1\n"
QUICK = Limits(wall_seconds=10, cpu_seconds=1, memory=256 << 20, disk=8 << 20, file_size=4 << 20, processes=8)


@functools.cache
def isolates() -> bool:
    try:
        return run_tests(GOOD, TEST).passed
    except SandboxError:
        return False


@pytest.fixture
def sandbox() -> None:
    if not isolates():
        pytest.skip("no namespaces on this system")


def inside(body: str, limits: Limits = QUICK) -> Execution:
    """Run ``body`` on import of a program whose function is wrong."""
    return run_tests(f"{body}\n\ndef f(x):\n    return 0\n", TEST, limits=limits)


@pytest.mark.usefixtures("sandbox")
def test_right_programs_pass_and_wrong_ones_fail() -> None:
    assert run_tests(GOOD, TEST).passed
    wrong = run_tests("def f(x):\n    print('hello')\n    return 2\n", TEST)
    assert (wrong.passed, wrong.output) == (False, "hello\nhello\n")
    assert "AssertionError" in wrong.reason
    assert run_tests("", TEST).reason == "NameError: name 'f' is not defined in the program"
    assert run_tests("def f(x:", TEST).reason.startswith("SyntaxError")
    assert run_tests("def f(x):\n    return [][x]", TEST).reason == "IndexError: list index out of range"
    assert run_tests(GOOD, "x = 1").reason == "the tests never used the program"


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("(1, 'a', None, True, 2.5, b'x', 1j)", "(1, 'a', None, True, 2.5, b'x', 1j)"),
        ("{1: [2, {3}], 'k': frozenset({4})}", "{1: [2, {3}], 'k': frozenset({4})}"),
        ("-(2 ** 20000)", "-(2 ** 20000)"),
        ("float('inf')", "float('inf')"),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}"),
        ("list(sorted([3, 1]))", "[1, 3]"),
    ],
)
def test_plain_data_crosses_unchanged(value: str, expected: str) -> None:
    tests = f"assert f({value}) == {expected}\nassert type(f({expected})) is type({expected})"
    assert run_tests("def f(x):\n    return x", tests).passed


@pytest.mark.usefixtures("sandbox")
def test_other_objects_stay_in_the_program() -> None:
    program = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 1 + depth(node.left) if node else 0
def gen(n): yield from range(n)
def sum(a, b): return a * b
limit = 7
"""
    tests = """
root = Node(1)
root.left = Node(2)
assert depth(root) == 2 and root.left.value == 2 and limit == 7
assert list(gen(3)) == [0, 1, 2] and next(gen(1)) == 0
assert sum(2, 5) == 10
try:
    depth(3)
except AttributeError:
    pass
else:
    raise AssertionError
"""
    assert run_tests(program, tests, ["sum"]).reason == ""
    assert run_tests(program, tests).reason == "TypeError: 'int' object is not iterable"


CHEATS = {
    "exit": "import sys; sys.exit(0)",
    "hard exit": "import os; os._exit(0)",
    "exit in the call": "def f(x):\n    import os; os._exit(0)",
    "raise in the call": "def f(x):\n    raise SystemExit(0)",
    "markers": "print('{\"passed\": true}\\nPASSED\\nOK\\n1 passed')",
    "every descriptor": (
        'import os\nfor d in range(64):\n    try: os.write(d, b\'{"passed": true, "token": "", "reason": ""}\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "equal to all": "class E:\n    def __eq__(s, o): return True\n    def __bool__(s): return True\ndef f(x):\n    return E()",  # noqa: E501
    "int equal to all": "class E(int):\n    def __eq__(s, o): return True\ndef f(x):\n    return E(0)",
    "patched builtins": "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\nf = lambda x: 0",
    "patched harness": (
        "import sys\nfor m in list(sys.modules.values()):\n    for n in ('judge', 'encode', 'receive', 'send'):\n"
        "        if hasattr(m, n): setattr(m, n, lambda *a: True)\nf = lambda x: 0"
    ),
    "frames": (
        "import sys, gc\nfound = [o for o in gc.get_objects() if isinstance(o, dict) and ('tests' in o or 'token' in o)]\n"  # noqa: E501
        "g = sys._getframe()\nwhile g:\n    found += [v for v in g.f_locals.values() if 'assert ' + 'f(' in str(v)]\n"
        "    g = g.f_back\nf = lambda x: x + 1 if found else 0"
    ),
    "standard input": "import sys\ndata = sys.stdin.read()\nf = lambda x: x + 1 if data else 0",
}


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_nothing(name: str) -> None:
    run = run_tests(CHEATS[name], TEST, limits=QUICK)
    assert not run.passed


@pytest.mark.usefixtures("sandbox")
def test_the_judge_cannot_be_reached() -> None:
    body = """
import ctypes, os, signal
for pid in (1, os.getppid()):
    for path in ("mem", "fd/0", "environ"):
        try:
            os.open(f"/proc/{pid}/{path}", os.O_RDONLY); print("opened", path)
        except OSError: pass
    if ctypes.CDLL(None).ptrace(16, pid, 0, 0) == 0: print("attached")
    for s in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV):
        try: os.kill(pid, s)
        except OSError: pass
print(os.getppid())
"""
    run = inside(body)
    assert (run.passed, run.output) == (False, "1\n")
    assert run.reason == "AssertionError: "  # the judge lived to run the tests


@pytest.mark.usefixtures("sandbox")
def test_killing_every_process_kills_only_the_program() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        run = inside(
            f"import os, signal\ntry: os.kill({os.getpid()}, 9)\nexcept OSError: print('none')\nos.kill(-1, 9)"
        )
        assert not run.passed
        assert run.output == "none\n"
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.usefixtures("sandbox")
def test_files_outside_are_neither_seen_nor_written(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    tmp_path.chmod(0o777)
    precious.chmod(0o666)
    run = inside(f"""
import os, shutil, sys
print(os.path.exists({str(precious)!r}), os.path.exists({str(Path.home())!r} + "/.bashrc"))
for path in ({str(precious)!r}, {str(tmp_path)!r} + "/new", "/new", "/usr/new", "/dev/new", sys.prefix + "/new"):
    try: open(path, "w").write("x"); print("wrote", path)
    except OSError: pass
for root in ("/", "/usr", sys.prefix):
    shutil.rmtree(root + "/bin", ignore_errors=True)
for command in ("mount -o remount,rw /usr", "umount /usr"):
    if os.system(command + " 2>/dev/null") == 0: print(command)
open("note", "w").write("mine")
print(os.listdir("."), os.environ["HOME"] == os.getcwd() == os.environ["TMPDIR"], os.getuid() != 0)
""")
    assert run.output == "False False\n['note'] True True\n"
    assert precious.read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]
    assert Path(sys.prefix, "bin").is_dir()


@pytest.mark.usefixtures("sandbox")
def test_no_network() -> None:
    with socket.socket() as listener, socket.socket(socket.AF_UNIX) as local:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        name = f"\0unmask-test-{os.getpid()}"
        local.bind(name)
        local.listen()
        run = inside(f"""
import socket
for family, address in ((socket.AF_INET, {listener.getsockname()!r}), (socket.AF_UNIX, {name!r})):
    try: socket.socket(family).connect(address); print("connected")
    except OSError as error: print("refused")
""")
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert run.output == "refused\nrefused\n"


@pytest.mark.usefixtures("sandbox")
def test_forks_are_bounded_and_do_not_survive() -> None:
    mark = f"unmask-test-{os.getpid()}-{time.time_ns()}"
    run = inside(f"""
import os, time
made = 0
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            os.execvp("sleep", ["{mark}", "60"])
        made += 1
    except OSError: break
time.sleep(0.2)
print(made)
""")
    assert 1 <= int(run.output) <= QUICK.processes
    assert not run.passed
    assert running(mark) == 0


def running(mark: str) -> int:
    count = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                count += mark.encode() in (folder / "cmdline").read_bytes()
            except OSError:
                continue
    return count


HOGS = {
    "memory": ("x = bytearray(1 << 30)", "MemoryError"),
    "disk": ("for i in range(100): open(str(i), 'wb').write(bytes(1 << 20))", "OSError: [Errno 28]"),
    "one file": (
        "import signal\nopen('x', 'wb').write(bytes(5 << 20))\nopen('y', 'wb').write(bytes(5 << 20))",
        "OSError",
    ),
    "open files": ("x = [open('/dev/null') for _ in range(1000)]", "OSError: [Errno 24]"),
    "processor": ("while True: pass", "Gone"),
    "sleep": ("import time; time.sleep(60)", "took longer than 2 s"),
    "long answer": ("def f(x): return 'x' * (1 << 25)\nf(0)", ""),
    "deep answer": ("f = None\nfor _ in range(5000): f = [f]\ng = f", ""),
}


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("name", HOGS)
def test_hogs_are_stopped(name: str) -> None:
    body, reason = HOGS[name]
    run = inside(body, replace(QUICK, wall_seconds=2 if name == "sleep" else 20))
    assert not run.passed
    assert reason in run.reason


FILTERED = platform.machine() in ("x86_64", "aarch64")


@pytest.mark.usefixtures("sandbox")
@pytest.mark.skipif(not FILTERED, reason="system calls are not filtered on this machine")
def test_no_memory_is_held_outside_of_the_limits() -> None:
    run = inside("""
import ctypes, errno, os, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def told(result): return errno.errorcode[ctypes.get_errno()] if result == -1 else "made"
print(told(libc.shmget(0, ctypes.c_size_t(1 << 20), 0o1600)), told(libc.msgget(0, 0o1600)))
print(told(libc.unshare(0x10000000)), told(libc.memfd_create(b"a", 0)))
print(told(libc.syscall(435, 0, 0)))  # clone3
thread = threading.Thread(target=print, args=("thread",), daemon=True)
thread.start(); thread.join()
print(subprocess.run([sys.executable, "-c", "print('process')"], capture_output=True, text=True).stdout, end="")
""")
    assert run.output == "EPERM EPERM\nEPERM EPERM\nENOSYS\nthread\nprocess\n"


@pytest.mark.usefixtures("sandbox")
def test_the_tests_memory_is_bounded_too() -> None:
    run = run_tests("def f(): return 1 << 30", "bytearray(f())", limits=QUICK)
    assert run.reason.startswith("MemoryError")


@pytest.mark.usefixtures("sandbox")
def test_long_answers_fail() -> None:
    run = run_tests("def f(x):\n    return 'x' * (1 << 24)", TEST)
    assert (run.passed, run.reason) == (False, "Gone: an answer is too long")
    run = run_tests("def f(x):\n    y = []\n    for _ in range(5000): y = [y]\n    return y", TEST)
    assert run.reason.startswith("RecursionError")


@pytest.mark.usefixtures("sandbox")
def test_output_is_bounded() -> None:
    run = inside("while True: print('x' * 1000)")
    assert not run.passed
    assert len(run.output) == QUICK.output


def usable(python: str) -> bool:
    """Whether another user can start an interpreter, new enough for the package."""
    command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
    try:
        return subprocess.run(command, user=1234, group=1234, extra_groups=[], cwd="/", env={}).returncode == 0
    except OSError:
        return False


@pytest.mark.usefixtures("sandbox")
@pytest.mark.skipif(os.geteuid() != 0, reason="starts a process as another user")
def test_the_sandbox_needs_no_root() -> None:
    code = (
        "from unmask.tasks.execution import run_tests\n"
        f"r = run_tests({GOOD!r}, {TEST!r}); print(r.passed, r.reason)\n"
        "p = 'import ctypes, os\\nprint(os.getuid(), ctypes.CDLL(None).unshare(1 << 28))\\nf = print'\n"
        "r = run_tests(p, 'f(0)')\n"
        "print(r.output, end='')"
    )
    readable = [p for p in (sys.executable, "/usr/bin/python3") if usable(p)]
    if not readable:
        pytest.skip("no interpreter that other users may run")
    run = subprocess.run(
        [readable[0], "-c", code], user=1234, group=1234, extra_groups=[], capture_output=True, text=True, cwd="/",
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin"},
    )  # fmt: skip
    if "Operation not permitted" in run.stderr:
        pytest.skip("namespaces for root only on this system")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0] == "True "
    assert run.stdout.splitlines()[1] == ("1234 -1" if FILTERED else "1234 0")  # no user namespace within


def test_the_weak_sandbox_has_limits_and_cleans_up() -> None:
    assert run_tests(GOOD, TEST, weak=True).passed
    mark = f"unmask-test-{os.getpid()}-{time.time_ns()}"
    body = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execvp('sleep', ['{mark}', '60'])\n"
    limits = Limits(wall_seconds=2, cpu_seconds=1, memory=256 << 20)
    run = run_tests(body + "time.sleep(0.2)\ndef f(x): return 0", TEST, limits=limits, weak=True)
    assert not run.passed
    assert running(mark) == 0
    run = run_tests(body + "time.sleep(60)", TEST, limits=limits, weak=True)
    assert run.reason == "took longer than 2 s"
    assert running(mark) == 0
    assert run_tests("x = bytearray(1 << 30)", TEST, limits=limits, weak=True).reason.startswith("MemoryError")
    assert not run_tests("import os; os._exit(0)", TEST, limits=limits, weak=True).passed


def test_without_namespaces_it_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from unmask.tasks import execution

    script = execution.SCRIPT.read_text(encoding="utf-8")
    for module in execution.SCRIPT.parent.glob("sandbox_*.py"):
        (tmp_path / module.name).write_text(module.read_text("utf-8"))
    (tmp_path / "sandbox.py").write_text(script.replace("LIBC.unshare(flags", "LIBC.unshare(-1"))
    monkeypatch.setattr(execution, "SCRIPT", tmp_path / "sandbox.py")
    with pytest.raises(SandboxError, match=r"no sandbox: .*unshare.*; allow a weaker sandbox with weak=True"):
        run_tests(GOOD, TEST)


def test_no_process_group_or_folder_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert run_tests(GOOD, TEST, weak=not isolates()).passed
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


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
        (200, 1, 100, 0.5),
        (10**5, 1, 1, 1e-5),
        (2000, 1, 1000, 0.5),
    ],
)
def test_pass_at_k(samples: int, correct: int, k: int, expected: float) -> None:
    assert pass_at_k(samples, correct, k) == expected


def test_pass_at_k_refuses_what_it_cannot_estimate() -> None:
    with pytest.raises(ValueError, match="k must be between 1 and the 5 samples, got 6"):
        pass_at_k(5, 1, 6)
    with pytest.raises(ValueError, match="k must be between 1 and the 5 samples, got 0"):
        pass_at_k(5, 1, 0)
    with pytest.raises(ValueError, match="correct must be between 0 and the 5 samples, got 6"):
        pass_at_k(5, 6, 1)

"""Run generated programs against tests, in a sandbox, and estimate pass@k.

:func:`run_tests` runs a program and then its tests in one Python process, inside bubblewrap (``bwrap``): the process
has no network, sees the interpreter and the system's libraries alone, read-only, and writes to an empty folder in
memory. It sees no other processes, and all its processes end with it. If root starts it, it takes a user number without
an account. Where bubblewrap is missing or may not make namespaces, ``run_tests`` raises, unless ``allow_unsandboxed``.
Then a program has all the rights of the user, within the limits. Allow that only in a container without valuable data.

A program passes if its tests ran to their end. The harness then sends a secret token through a pipe, so a program
cannot pass by printing or exiting. The tests run in the program's process, so a program written to cheat can still
pass, for example with objects that are equal to everything. Nothing within one Python process prevents that.
"""

from __future__ import annotations

import contextlib
import functools
import marshal
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HARNESS = Path(__file__).with_name("harness.py")
LOADER = "import marshal, sys; exec(marshal.load(sys.stdin.buffer))"
SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/urandom")


class SandboxError(RuntimeError):
    """Programs cannot be run in bubblewrap here, whatever they are."""


@dataclass(frozen=True)
class Limits:
    """The resources of a program: seconds, bytes and counts. CPU time, memory and open files are per process.

    ``disk`` bounds the sandbox's folder, ``file_size`` each file and what the program prints, ``output`` how much of
    that is kept. ``processes`` counts threads too; Linux before 5.14 counts all of the user's, and without a sandbox
    root has no such limit.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 8
    memory: int = 512 << 20
    file_size: int = 16 << 20
    disk: int = 64 << 20
    processes: int = 16
    open_files: int = 64
    output: int = 1 << 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Execution:
    """The result of a run: whether the tests passed, why not, and the first ``Limits.output`` bytes of the output."""

    passed: bool
    reason: str
    output: str
    seconds: float


def run_tests(
    program: str,
    tests: str,
    entry_points: Sequence[str] = (),
    limits: Limits | None = None,
    allow_unsandboxed: bool = False,
) -> Execution:
    """Run ``program``, then ``tests``, which see the program's names; ``entry_points`` win over builtins.

    Raises SandboxError as :func:`check_sandbox` does. Safe to call from several threads.
    """
    return execute(program, tests, entry_points, limits or Limits(), check_sandbox(allow_unsandboxed))


def check_sandbox(allow_unsandboxed: bool = False) -> str | None:
    """The path of a working bubblewrap, or None with ``allow_unsandboxed``; else SandboxError says what is wrong."""
    bwrap = shutil.which("bwrap")
    fault = sandbox_fault(bwrap) if bwrap else "bubblewrap (bwrap) is not installed"
    if fault and not allow_unsandboxed:
        raise SandboxError(
            f"no sandbox to run programs in: {fault}; install bubblewrap 0.8 or later, or work in a container and give "
            "programs your rights there: allow_unsandboxed=True, on the command line allow_unsandboxed=true"
        )
    return None if fault else bwrap


@functools.cache
def sandbox_fault(bwrap: str) -> str:
    """The reason why a program that only imports a module fails in this bubblewrap; "" if it passes."""
    run = execute("import statistics", "", (), Limits(wall_seconds=60), bwrap)
    return "" if run.passed else run.output.strip() or run.reason


def execute(program: str, tests: str, entry_points: Sequence[str], limits: Limits, bwrap: str | None) -> Execution:
    """:func:`run_tests` in the bubblewrap at ``bwrap``; with None, outside of a sandbox."""
    token = secrets.token_bytes(32)
    job = marshal.dumps({
        "program": program,
        "tests": tests,
        "entry_points": list(entry_points),
        "token": token,
        "path": package_folders(),
        "limits": {
            "CPU": limits.cpu_seconds,
            "AS": limits.memory,
            "FSIZE": limits.file_size,
            "NPROC": limits.processes + (0 if bwrap else tasks_of_user()),
            "NOFILE": limits.open_files,
            "CORE": 0,
        },
        "user": 65000 + secrets.randbelow(500) if bwrap and os.geteuid() == 0 else 0,
    })  # fmt: skip
    started = time.monotonic()
    with open(os.memfd_create("output"), "w+b", 0) as output:
        with scratch_folder(bwrap is None) as folder:
            verdict = supervise(job, output.fileno(), folder, limits, bwrap)
        output.seek(0)
        printed = output.read(limits.output).decode("utf-8", "replace")
    passed = verdict is not None and secrets.compare_digest(verdict, token)
    if verdict is None:
        reason = f"took longer than {limits.wall_seconds:g} s"
    else:
        reason = "" if passed else verdict.decode("utf-8", "replace") or "ended without a verdict"
    return Execution(passed, reason, printed, time.monotonic() - started)


def supervise(job: bytes, output: int, folder: str, limits: Limits, bwrap: str | None) -> bytes | None:
    """Run the harness in a process group of its own; returns its verdict, None after the time limit. Ends the group.

    A verdict is at most 4,000 bytes, which a pipe delivers in one piece. Without a verdict the pipe ends, as b"".
    """
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "LD_LIBRARY_PATH" in os.environ:  # an interpreter may need it to start
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    read_end, write_end = os.pipe()
    # Unlike -I, this environment and -S keep the hash seed. The harness adds the installed packages.
    command = [sys.executable, "-S", "-B", "-u", "-c", LOADER, str(write_end)]
    with open(read_end, "rb", 0) as verdict:
        with open(write_end, "wb", 0):
            process = subprocess.Popen(
                [*sandbox(bwrap, limits.disk), *command] if bwrap else command,
                stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(write_end,),
                env=environment, cwd=folder, start_new_session=True,
            )  # fmt: skip
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write(harness() + job)
            poll = select.poll()
            poll.register(verdict, select.POLLIN)
            return verdict.read(4096) if poll.poll(1000 * limits.wall_seconds) else None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@functools.cache
def harness() -> bytes:
    """The code that :data:`LOADER` runs, compiled once, because that takes as long as a small program."""
    return marshal.dumps(compile(HARNESS.read_text("utf-8"), "<harness>", "exec", dont_inherit=True))


@functools.cache
def sandbox(bwrap: str, disk: int) -> list[str]:
    """The command that runs another in a sandbox: system and interpreter, read-only, and a ``/tmp`` of ``disk`` bytes.

    It has no ``/proc``, which would give access to the memory and descriptors of its processes. A user needs a user
    namespace for all this. Root enters none, because the kernel does not limit processes whose user is root outside
    of their namespace; there the harness becomes another user.
    """
    command = [bwrap, "--die-with-parent", "--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"]
    if os.geteuid():
        command += ["--unshare-user", "--disable-userns"]
    else:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    command += ["--ro-bind", "/usr", "/usr", "--perms", "1777", "--size", str(disk), "--tmpfs", "/tmp"]
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    prefixes |= {os.path.realpath(prefix) for prefix in prefixes}
    home, bound = os.environ.get("HOME") or "/", ["/usr"]
    for path in (*SYSTEM, *sorted(prefixes.union(package_folders()))):
        if os.path.exists(path) and not within(home, path) and not any(within(path, folder) for folder in bound):
            command += ["--dir", os.path.dirname(path)]  # a bind may create it without access for others
            command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
            bound.append(path)
    for path in DEVICES:
        command += ["--dir", "/dev", "--dev-bind", path, path]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def package_folders() -> list[str]:
    """Where this interpreter finds installed packages."""
    return [os.path.abspath(p) for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]


def within(path: str, folder: str) -> bool:
    """Whether the absolute ``path`` is ``folder`` or lies in it."""
    return os.path.commonpath([path, folder]) == folder


def tasks_of_user() -> int:
    """The number of the user's threads on this machine, which count towards the process limit outside a sandbox."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            count += len(os.listdir(f"/proc/{process}/task")) * (os.stat(f"/proc/{process}").st_uid == os.geteuid())
    return count


@contextlib.contextmanager
def scratch_folder(needed: bool) -> Iterator[str]:
    """A new folder, if ``needed``, removed afterwards however deep a program has made it; else ``/tmp``."""
    folder = tempfile.mkdtemp(prefix="unmask-") if needed else "/tmp"
    try:
        yield folder
    finally:
        if needed:  # not by shutil.rmtree, which recurses
            subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the probability that one of ``k`` samples is correct."""
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be between 0 and the {samples} samples, got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples, got {k}")
    total = math.comb(samples, k)
    return (total - math.comb(samples - correct, k)) / total

"""Run generated programs against tests, in a sandbox, and estimate pass@k.

On Linux, :func:`run_tests` gives a program its own user, mount, net, pid and ipc namespaces: it sees the
interpreter and the system's libraries, read-only, and one empty folder of memory it may write to; it has no network,
no privilege, no process but its own, and limits on everything it can use up. Started by root it runs as nobody.
Where the system offers no namespaces, ``run_tests`` refuses, unless ``weak=True``: then a program has the limits and,
if started by root, the rights of nobody, but it can read and write what that user can, reach the network, and signal
processes of the same user.

A program passes if the tests ran to their end. They run in another process than the program, which sees the calls and
answers them with plain data, so that printing, exiting, patching builtins or overriding ``__eq__`` gain it nothing.
(An object's own ``__eq__`` decides only between two objects of the program.)

Calls carry numbers, strings, dates and containers of these, both ways, with what a call changes in the lists, dicts and
sets that it is given. Functions of the tests and objects of the program are carried as proxies. Where tests need more
(objects of their own classes as arguments, an array, a program's operator on a value of theirs), a run is not
``gradable``. Lists, sets and dicts of a program's own classes arrive as plain ones; what a program keeps of an argument
after a call is a copy.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

SCRIPT = Path(__file__).with_name("sandbox.py")
MAX_VERDICT = 1 << 16


class SandboxError(RuntimeError):
    """The sandbox could not be set up; says nothing about the program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: seconds, bytes and counts. CPU time, memory and open files are per process.

    So the most memory is ``(processes + 1) * memory + disk``, one for the tests, and the kernel's buffers for pipes and
    sockets. Memory that belongs to no process (System V segments, memfd), keyrings, sockets other than a namespace's
    own and the like are denied on x86-64 and arm64 alone.
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
    """How a run went: whether the tests passed, why not, and the first ``Limits.output`` bytes the program printed.

    Not ``gradable``: the tests and the program exchange what the sandbox cannot carry, so nothing is known of the
    program.
    """

    passed: bool
    reason: str
    output: str
    seconds: float
    gradable: bool = True


def run_tests(
    program: str,
    tests: str,
    entry_points: Sequence[str] = (),
    limits: Limits | None = None,
    weak: bool = False,
) -> Execution:
    """Run ``program``, then ``tests``, which see the program's names; ``entry_points`` win over builtins.

    Raises SandboxError where there is no sandbox to be had. Safe to call from several threads.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)
    with scratch_folder() as folder, tempfile.TemporaryFile() as job:
        write_part(job, {"program": program, "limits": asdict(limits), "weak": weak, "folder": folder})
        write_part(job, {"tests": tests, "entry_points": list(entry_points), "token": token})
        job.seek(0)
        started = time.monotonic()
        verdict, output, timed_out = supervise(job, folder, limits, "/sandbox" if not weak else folder)
    seconds = time.monotonic() - started
    text = output.decode("utf-8", "replace")
    if timed_out:
        return Execution(False, f"took longer than {limits.wall_seconds:g} s", text, seconds)
    try:
        report = json.loads(verdict)
    except ValueError:
        report = None
    if not isinstance(report, dict) or not ("setup" in report or {"passed", "reason", "token"} <= set(report)):
        return Execution(False, "ended without a verdict", text, seconds)
    if "setup" in report:
        hint = "" if weak else "; allow a weaker sandbox with weak=True (tasks: allow_weak_sandbox=True)"
        raise SandboxError(f"no sandbox: {report['setup']}{hint}")
    passed = bool(report["passed"]) and secrets.compare_digest(str(report["token"]), token)
    return Execution(passed, report["reason"], text, seconds, report.get("gradable", True))


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder of its own, removed afterwards however deep a program has made it (Python's own ways recurse)."""
    folder = tempfile.mkdtemp(prefix="unmask-")
    try:
        yield folder
    finally:
        subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL, check=False)


def write_part(file: IO[bytes], part: dict[str, object]) -> None:
    data = json.dumps(part).encode("ascii")
    file.write(struct.pack("=I", len(data)) + data)


def supervise(job: IO[bytes], folder: str, limits: Limits, home: str) -> tuple[bytes, bytes, bool]:
    """Start the sandbox; its verdict, the program's output and whether time ran out. Nothing runs on afterwards."""
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    environment |= {"HOME": home, "TMPDIR": home, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "LD_LIBRARY_PATH" in os.environ:  # an interpreter may need it to start
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    deadline = time.monotonic() + limits.wall_seconds
    verdict_read, verdict_write = os.pipe()
    output_read, output_write = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-B", "-u", str(SCRIPT), str(verdict_write)],
            stdin=job, stdout=output_write, stderr=output_write, pass_fds=(verdict_write,),
            env=environment, cwd=folder, start_new_session=True,
        )  # fmt: skip
    except BaseException:
        for descriptor in (verdict_read, output_read):
            os.close(descriptor)
        raise
    finally:
        os.close(verdict_write)
        os.close(output_write)
    kept = {verdict_read: bytearray(), output_read: bytearray()}
    most = {verdict_read: MAX_VERDICT, output_read: limits.output}
    timed_out = False
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor in kept:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            ended = False
            while not ended:
                left = deadline - time.monotonic()
                ready = [key.fd for key, _ in selector.select(max(left, 0))]
                if left <= 0:
                    timed_out = True
                    break
                if ready == [verdict_read]:
                    ready.append(output_read)  # what was printed before the end
                for descriptor in ready:
                    try:
                        data = os.read(descriptor, 1 << 16)
                    except BlockingIOError:
                        continue
                    kept[descriptor] += data[: most[descriptor] - len(kept[descriptor])]
                    if not data:
                        ended |= descriptor == verdict_read
                        if descriptor in selector.get_map():
                            selector.unregister(descriptor)
    finally:
        end(process)
        os.close(verdict_read)
        os.close(output_read)
    return bytes(kept[verdict_read]), bytes(kept[output_read]), timed_out


def end(process: subprocess.Popen[bytes]) -> None:
    """Let the supervisor remove what is left; take away the whole process group if it does not."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of ``k`` of the n samples is correct,
    from exact integers, rounded once."""
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must be between 0 and the {samples} samples, got {correct}")
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples, got {k}")
    total = math.comb(samples, k)
    return (total - math.comb(samples - correct, k)) / total

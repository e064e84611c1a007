"""Equal expressions, by math-verify in a process of its own, which is ended where it takes too long or too much memory.

A computer algebra system may never finish, and a thread cannot stop it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import subprocess
import sys
import threading
from typing import Any

LIMIT = 5.0
"""Seconds for a pair of answers; those that take longer are not equal."""
MEMORY = 4 << 30
"""Bytes of the process's address space."""
DIGITS = 1e-6
"""Numbers that differ by less, relative to their size, are equal."""


class Worker:
    """Asks a process, which is replaced where it has ended; any thread may ask."""

    def __init__(self) -> None:
        self.lock, self.process = threading.Lock(), None

    process: subprocess.Popen[str] | None

    def equal(self, expected: str, given: str) -> bool:
        """Whether two answers in LaTeX are equal as expressions."""
        with self.lock:
            alive = self.process is not None and self.process.poll() is None
            process, self.process = (self.process if alive else None) or start(), None
            timer = threading.Timer(LIMIT, process.kill)
            timer.start()
            with contextlib.suppress(OSError):  # it has ended
                print(json.dumps([expected, given]), file=process.stdin, flush=True)
            said = process.stdout.readline() if process.stdout else ""
            timer.cancel()
            timer.join()  # it may just have ended the process
            if said and process.poll() is None:
                self.process = process
            else:
                process.wait()
            return said == "true\n"


def start() -> subprocess.Popen[str]:
    """A process that runs :func:`main` and is ready."""
    words = [sys.executable, "-c", "from unmask.tasks.equivalence import main; main()"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if process.stdout:
        process.stdout.readline()
    return process


def equal(library: Any, expected: str, given: str) -> bool:
    """Whether math-verify finds two answers equal, and numbers among them differ by rounding only."""
    how = {"parsing_timeout": None, "raise_on_error": False}
    read = [library.parse(rf"\boxed{{{text}}}", **how) for text in (expected, given)]
    if not all(read) or not library.verify(*read, timeout_seconds=None, raise_on_error=False):
        return False
    try:  # the library rounds to some digits behind the point, so that all tiny numbers are equal
        one, other = (expressions[0].evalf() for expressions in read)
        return bool(abs(one - other) <= DIGITS * abs(one))
    except (TypeError, AttributeError, ValueError):  # no numbers
        return True


def main() -> None:
    """Answer pairs from standard input."""
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # its parent ends it
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(math_verify, *json.loads(line))), flush=True)

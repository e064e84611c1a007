"""Run Python in a process of its own, on the unmask that these tests import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import unmask


def run_python(
    program: str, *arguments: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``python -c program arguments``; ``path`` is put on the module search path, ``environment`` into the variables.

    It starts in the folder that holds the package: from the root of a checkout ``import unmask`` would find the
    sources there, without the compiled part, and not the installed package.
    """
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(unmask.__file__).parents[1],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )

"""PEP 517 backend: setuptools, built against a torch that is there already, if possible that of the target environment.

An isolated build does not see the packages of the environment it builds for. Requiring torch as a build dependency
would then download a second torch, maybe one for another CUDA. So this backend looks for a torch (2.11 or newer) in the
environments it may be building for, and makes the first one importable during the build. Only if there is none does a
pinned torch become a build requirement. Which of them it is does not matter afterwards: the extension uses torch's
stable ABI, so it runs with any torch from 2.11 on, of CPU or CUDA. Where nothing is compiled no torch is asked for.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are not replaced below: they compile nothing)

PINNED_TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 11)

# Prints what kind of Python runs it, the version of its torch (without importing that, which is slow) and its sys.path.
_PROBE = """
import importlib.metadata, json, sys, sysconfig
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = None
print(json.dumps([[sys.implementation.cache_tag, sysconfig.get_platform()], torch, [p for p in sys.path if p]]))
"""


def switch(name: str) -> bool | None:
    """The environment variable as yes or no; None where it is not set or empty.

    Raises:
        ValueError: it is neither.
    """
    words = {"": None, "0": False, "false": False, "off": False, "no": False}
    words |= {"1": True, "true": True, "on": True, "yes": True}
    value = os.environ.get(name, "")
    if value.lower() not in words:
        raise ValueError(f"{name}={value!r}: expected 0, false, off or no; or 1, true, on or yes")
    return words[value.lower()]


def reason_for_no_extension() -> str | None:
    """Why unmask is to be installed without its compiled ops; None where they are compiled."""
    if switch("UNMASK_NO_EXT"):
        return "UNMASK_NO_EXT is set"
    if sys.platform == "win32":
        return "MSVC cannot compile its kernels"
    named = os.environ.get("CXX")
    if named and shutil.which(shlex.split(named)[0]) is None:
        raise ValueError(f"CXX={named!r}: there is no such compiler")
    compiler = named or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler was found (c++, g++ or clang++ on PATH, or one that CXX names)"
    os.environ["CXX"] = compiler  # torch takes c++ otherwise, which may not be there
    return None


def _parent(file: str) -> list[str]:
    """Words of a file about the process that runs the build; none where the system has no /proc."""
    try:
        return Path(f"/proc/{os.getppid()}/{file}").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _interpreters() -> Iterator[str | None]:
    """Interpreters of the environments that may be the target."""
    # pip runs that of the target itself, and isolates the build by PYTHONPATH and PYTHONNOUSERSITE alone.
    yield sys.executable
    # uv and `python -m build` make an environment of their own. The target is named in what they were started with
    # (uv --python X; X -m build), or it is the active environment, which uv hides from here, or .venv, uv's default.
    places = [word.removeprefix("--python=") for word in _parent("cmdline")]
    places += [word.removeprefix("VIRTUAL_ENV=") for word in _parent("environ") if word.startswith("VIRTUAL_ENV=")]
    places += [os.environ.get("UV_PYTHON", ""), os.environ.get("VIRTUAL_ENV", ""), os.path.abspath(".venv")]
    for place in filter(None, places):
        path = os.path.join(f"/proc/{os.getppid()}/cwd", place)
        is_python = re.fullmatch(r"python[\d.]*", os.path.basename(path)) and os.path.isfile(path)
        yield path if is_python else shutil.which("python3", path=f"{path}/bin")
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield shutil.which("python3", path=folder)


def _new_enough(version: str | None) -> bool:
    numbers = (version or "").split("+")[0].split(".")[:2]
    return all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) >= OLDEST_TORCH


@cache
def _torch_paths() -> list[str] | None:
    """What to add to sys.path so that a torch that will do can be imported; None if no environment has one."""
    try:  # without isolation, or as a build requirement
        if _new_enough(importlib.metadata.version("torch")):
            return []
    except importlib.metadata.PackageNotFoundError:
        pass
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    for interpreter in dict.fromkeys(filter(None, _interpreters())):
        try:
            done = subprocess.run([interpreter, "-c", _PROBE], env=environment, capture_output=True, timeout=60)
            # A sitecustomize may print too: the answer is the last line.
            kind, version, paths = json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            continue
        if kind == [sys.implementation.cache_tag, sysconfig.get_platform()] and _new_enough(version):
            return list(paths)
    return None


def _requirements(config_settings: Any = None) -> list[str]:
    return [PINNED_TORCH] if reason_for_no_extension() is None and _torch_paths() is None else []


get_requires_for_build_wheel = get_requires_for_build_editable = _requirements


def _prepare() -> None:
    """Make a torch importable, after everything that the isolated environment provides, and drop what is stale."""
    if reason_for_no_extension() is None:
        paths = _torch_paths()
        if paths is None:
            raise RuntimeError(f"building unmask needs torch >= 2.11, and there is none: pip install {PINNED_TORCH}")
        sys.path.extend(path for path in paths if path not in sys.path)
    for folder in Path("build").glob("lib*"):  # else files deleted since the last build would be packaged
        shutil.rmtree(folder)


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _prepare()
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _prepare()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))

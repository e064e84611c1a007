"""PEP 517 backend: setuptools, built against the torch of the environment that ``pip install`` fills.

An isolated build does not see the packages of the environment it builds for. Requiring torch as a build dependency
would then download a second torch, maybe one for another CUDA. So this backend asks the interpreter, outside the
isolation, whether it has a torch that will do (2.11 or newer). If so, that one is made importable during the build;
if not, a pinned torch becomes a build requirement. Either way the result runs with any torch from 2.11 on, because the
extension uses torch's stable ABI only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from setuptools import build_meta

PINNED_TORCH = "torch==2.13.0"
OLDEST_TORCH = (2, 11)

# Runs in the target environment; prints its sys.path if there is a torch, without importing it (which is slow).
_PROBE = """
import importlib.metadata, importlib.util, json, sys
sys.path = [p for p in sys.path if p]
try:
    found = importlib.util.find_spec("torch") is not None
    version = importlib.metadata.version("torch") if found else None
except importlib.metadata.PackageNotFoundError:
    version = None
print(json.dumps({"version": version, "path": sys.path}))
"""


def _probe_target() -> dict[str, Any]:
    """{"version": of the target environment's torch or None, "path": its sys.path}."""
    # pip isolates a build by PYTHONPATH and PYTHONNOUSERSITE; the same interpreter without them is the target.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        # A sitecustomize may print too: the answer is the last line.
        answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {"version": None, "path": []}
    return answer


def _new_enough(version: str | None) -> bool:
    if not version:
        return False
    numbers = version.split("+")[0].split(".")[:2]
    return len(numbers) == 2 and all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) >= OLDEST_TORCH


def _importable_torch() -> str | None:
    """Version of the torch this process can import already (no isolation, or a build requirement), else None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _torch_requirement() -> list[str]:
    if _new_enough(_importable_torch()) or _new_enough(_probe_target()["version"]):
        return []
    return [PINNED_TORCH]


def _use_target_torch() -> None:
    """Make the target's torch importable here, after everything that the isolated environment itself provides."""
    if _importable_torch() is not None:
        return
    target = _probe_target()
    if not _new_enough(target["version"]):
        raise RuntimeError(
            f"building unmask needs torch >= 2.11, found {target['version']}: pip install {PINNED_TORCH}"
        )
    sys.path.extend(path for path in target["path"] if path not in sys.path)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _torch_requirement()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _torch_requirement()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    _use_target_torch()
    return str(build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    _use_target_torch()
    return str(build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _use_target_torch()
    return str(build_meta.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    _use_target_torch()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    _use_target_torch()
    return str(build_meta.build_sdist(sdist_directory, config_settings))

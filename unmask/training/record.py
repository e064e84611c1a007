"""What a run leaves beside its policy: how it was trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import unmask

TRAINING_FILE = "training.json"
CONFIG_FILE = "config.yaml"
CONFIG_HEADER = "# Every setting of the run, as `unmask train` wrote it at the start.\n"


def write_training(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record``, as :func:`training_record` makes it, to ``training.json`` of a policy's folder."""
    partial = folder / f"{TRAINING_FILE}.part"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / TRAINING_FILE)


def training_record(
    config: Mapping[str, Any], iteration: int, processes: int, replaced: list[str], commit: str
) -> dict[str, Any]:
    """How a policy came about: "config" (every setting), "replaced" (what was given to the Trainer in place of what the
    config names), "iteration", "processes", "unmask" (version) and "commit" ("" if unknown)."""
    return {
        "config": config,
        "replaced": replaced,
        "iteration": iteration,
        "processes": processes,
        "unmask": unmask.__version__,
        "commit": commit,
    }


def read_training(folder: Path) -> dict[str, Any] | None:
    """The record beside a policy, None if there is none; ValueError for one that cannot be read."""
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path}: expected a JSON object with a config")
    return record


def write_config(output_dir: Path, config: Mapping[str, Any]) -> None:
    """Write every setting to ``config.yaml``, from which the run can be repeated; a file of somebody's own stays."""
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / CONFIG_FILE
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(CONFIG_HEADER):
        return
    plain = json.loads(json.dumps(config))  # no tuples, which YAML would tag
    path.write_text(CONFIG_HEADER + yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")

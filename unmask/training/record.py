"""The record of a training run that is kept beside its policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import unmask
from unmask.files import write_atomically
from unmask.models.sources import packaged_models, read_json
from unmask.policies.card import is_hub_id
from unmask.training.config import OBSERVATIONAL, TrainerConfig

TRAINING_FILE = "training.json"
CONFIG_FILE = "config.yaml"
CONFIG_HEADER = "# Every setting of the run, as `unmask train` wrote it at the start.\n"


def write_training(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record``, as :func:`training_record` makes it, to ``training.json`` of a policy's folder."""
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(folder / TRAINING_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def training_record(
    config: Mapping[str, Any], iteration: int, processes: int, replaced: list[str], commit: str
) -> dict[str, Any]:
    """How a policy was trained. ``replaced`` names the arguments of the Trainer that replaced settings; "unmask" is the
    version, ``commit`` is "" if unknown."""
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
    record = read_json(path)
    if not isinstance(record.get("config"), dict):
        raise ValueError(f"{path}: expected a JSON object with a config")
    return record


def told(folder: Path, given: str | None, base_model: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """The training settings and the base model for a policy's card: from training.json, else as given.

    ``given`` names a training configuration. Raises ValueError where it or ``base_model`` contradicts training.json.
    """
    config = None if given is None else learned_from(TrainerConfig.from_yaml(given).to_dict())
    record = read_training(folder)
    if record is None:
        return config, base_model
    place = folder / TRAINING_FILE
    training = learned_from(record["config"])
    if config is not None and (differing := [name for name in config if config[name] != training.get(name)]):
        raise ValueError(
            f"{given} is not how the policy was trained: {place} differs in {', '.join(differing)}; leave it out"
        )
    replaced = record.get("replaced", [])
    if "model" not in replaced and is_public(training.get("model")):
        if base_model not in (None, training["model"]):
            raise ValueError(f"base model {base_model}: by {place} the policy was trained on {training['model']}")
        base_model = training["model"]
    else:  # a local folder, or a model that was given as an object
        training.pop("model", None)
    training = {name: value for name, value in training.items() if name not in replaced}
    facts = ("replaced", "iteration", "processes", "unmask", "commit")
    return training | {name: record[name] for name in facts if record.get(name)}, base_model


def learned_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect what is learned, in JSON's types."""
    return {name: value for name, value in json.loads(json.dumps(config)).items() if name not in OBSERVATIONAL}


def is_public(model: Any) -> bool:
    """Whether ``model`` has the same meaning elsewhere: a packaged name, or a hub id that is no folder here."""
    return isinstance(model, str) and (model in packaged_models() or (is_hub_id(model) and not Path(model).is_dir()))


def write_config(output_dir: Path, config: Mapping[str, Any]) -> None:
    """Write every setting to ``config.yaml``, from which the run can be repeated; a user's own file is kept."""
    import yaml

    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / CONFIG_FILE
    if path.is_file() and not path.read_text(encoding="utf-8").startswith(CONFIG_HEADER):
        return
    plain = json.loads(json.dumps(config))  # no tuples, which YAML would tag
    path.write_text(CONFIG_HEADER + yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")

"""The record of a training run that is kept beside its policy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import unmask
from unmask.commit import package_commit
from unmask.config import Config
from unmask.files import make_folder, write_atomically
from unmask.models.sources import packaged_models, read_json
from unmask.policies.card import is_hub_id
from unmask.text import read_text
from unmask.training.config import OBSERVATIONAL, TrainerConfig

TRAINING_FILE = "training.json"
CONFIG_FILE = "config.yaml"
REPLACES = {
    "model": ("model", "quantization"),
    "task": ("task", "task_options", "prompts"),
    "policy": ("policy", "init_policy"),
}
"""The settings that arguments of a Trainer take the place of."""
RESOLVED = ("dtype", "chat_template")
"""Settings of which training.json has what they turned out to be."""
CONFIG_HEADER = "# The settings of the run, as they were at its start.\n"


def write_training(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``record``, as :func:`training_record` makes it, to ``training.json`` of a policy's folder."""
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(folder / TRAINING_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def training_record(
    config: Config, iteration: int, parts: Sequence[Mapping[str, Any]], replaced: Mapping[str, Any], **known: Any
) -> dict[str, Any]:
    """How a policy was trained.

    ``replaced`` are the arguments of the Trainer that took the place of settings, by name. ``known`` is what settings
    that were left open turned out to be. ``parts`` of the run, as :func:`run_part` makes them, are listed if there were
    several.
    """
    settings = settings_used(config, replaced)
    facts = {"parts": list(parts)} if len(parts) > 1 else {k: v for k, v in parts[0].items() if k != "from"}
    names = {name: place_of(value) for name, value in replaced.items()}
    return {"config": settings | known, "replaced": names, "iteration": iteration, **facts}


def settings_used(config: Config, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that arguments ``replaced``, and without a task whose prompts came from a file."""
    unused = {name for argument in replaced for name in REPLACES.get(argument, ())}
    if getattr(config, "prompts", None) is not None:
        unused |= {"task", "task_options"}
    settings = {name: value for name, value in config.to_dict().items() if name not in unused}
    if "reward_functions" in replaced and isinstance(config, TrainerConfig):
        settings["reward"] = config.reward_rule
    return settings


def run_part(iteration: int, processes: int) -> dict[str, Any]:
    """A stretch of a run without a stop: from which iteration on, on how many processes, and by which code."""
    return {"from": iteration, "processes": processes, "unmask": unmask.__version__, "commit": package_commit()}


def with_part(parts: Sequence[Mapping[str, Any]], part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``parts`` and then ``part``, unless it goes on as the last one did."""
    same = bool(parts) and {**part, "from": 0} == {**parts[-1], "from": 0}
    return [dict(one) for one in (*parts, *([] if same else [part]))]


def place_of(value: Any) -> Any:
    """Where an argument is defined, "module:name": a function itself, of another object its class."""
    if isinstance(value, (list, tuple)):
        return [place_of(one) for one in value]
    home = value if hasattr(value, "__qualname__") else type(value)
    return f"{home.__module__}:{home.__qualname__}"


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
    given_open = {name for name in RESOLVED if config and config.get(name) is None}
    compared = [name for name in config or {} if name in training and name not in given_open]
    if config is not None and (differing := [name for name in compared if config[name] != training[name]]):
        raise ValueError(
            f"{given} is not how the policy was trained: {place} differs in {', '.join(differing)}; leave it out"
        )
    replaced = record.get("replaced", [])
    models = training.get("model")
    models = models if isinstance(models, list) else [models]
    if "model" not in replaced and all(map(is_public, models)):
        if base_model not in (None, *models):
            raise ValueError(f"base model {base_model}: by {place} the policy was trained on {', '.join(models)}")
        base_model = base_model or models[0]
    else:  # a local folder, or a model that was given as an object
        training.pop("model", None)
    training = {name: value for name, value in training.items() if name not in replaced}
    facts = ("replaced", "iteration", "processes", "unmask", "commit", "parts")
    return training | {name: record[name] for name in facts if record.get(name)}, base_model


def learned_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that affect what is learned, in JSON's types."""
    return {name: value for name, value in json.loads(json.dumps(config)).items() if name not in OBSERVATIONAL}


def is_public(model: Any) -> bool:
    """Whether ``model`` has the same meaning elsewhere: a packaged name, or a hub id that is no folder here."""
    return isinstance(model, str) and (model in packaged_models() or (is_hub_id(model) and not Path(model).is_dir()))


def write_config(output_dir: Path, config: Config, replaced: Mapping[str, Any]) -> None:
    """Write the settings of a run to ``config.yaml``; a user's own file is kept.

    The run can be repeated from it, with the same arguments in the place of settings; it names these.
    """
    import yaml

    make_folder(output_dir)
    path = output_dir / CONFIG_FILE
    if path.is_file() and not read_text(path).startswith(CONFIG_HEADER):
        return
    plain = json.loads(json.dumps(settings_used(config, replaced)))  # no tuples, which YAML would tag
    given = [f"# Given to the Trainer as an argument: {name}: {place_of(value)}\n" for name, value in replaced.items()]
    text = CONFIG_HEADER + "".join(given) + yaml.safe_dump(plain, sort_keys=False)
    path.write_text(text, encoding="utf-8")

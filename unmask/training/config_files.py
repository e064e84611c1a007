"""Configuration files: YAML, the packaged ones by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file ``name``, or the packaged configuration of that name."""
    path = Path(name).expanduser()
    packaged = CONFIGS / f"{name}.yaml"
    if path.is_file():
        return path
    if str(name) in packaged_configs():
        return packaged
    raise FileNotFoundError(f"no configuration file {str(name)!r}; packaged ones are {', '.join(packaged_configs())}")


def read_config(file: Path) -> dict[str, Any]:
    """The settings in ``file``, over those of the configuration that its key ``extends`` names, if it has one.

    That is a file, relative to this one, or a packaged name, and may not extend another.

    Raises:
        FileNotFoundError: no such configuration to extend.
        ValueError: not a mapping, or two levels of extension.
        ImportError: PyYAML is not installed.
    """
    values = read_yaml(file)
    if "extends" not in values:
        return values
    name = str(values.pop("extends"))
    beside = file.parent / name
    base = beside if beside.is_file() else find_config(name)
    inherited = read_yaml(base)
    if "extends" in inherited:
        raise ValueError(f"{file}: extends {name}, which itself extends {inherited['extends']}; expected one level")
    return {**inherited, **values}


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; errors as for :func:`read_config`."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError('training configurations need PyYAML: pip install "unmask[train]"') from error
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of settings, got {type(values).__name__}")
    return values

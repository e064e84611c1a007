"""Settings from YAML files, the packaged ones by name, and from ``NAME=VALUE`` pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from unmask.config import Config

CONFIGS = Path(__file__).parent / "configs"

Kind = TypeVar("Kind", bound=Config)
Layer = tuple[str, Mapping[str, Any]]
"""Where settings come from, and the settings."""


class Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number it is, for which YAML 1.1 wants a point."""


EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def packaged_configs() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The file ``name``, or the packaged configuration of that name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if str(name) in packaged_configs():
        return CONFIGS / f"{name}.yaml"
    raise FileNotFoundError(f"no configuration file {str(name)!r}; packaged ones are {', '.join(packaged_configs())}")


def read_layers(name: str | Path) -> list[Layer]:
    """The settings of the configuration ``name``, behind those of the one that its key ``extends`` names, if any.

    That is a file, relative to this one, or a packaged name, and may not extend another.

    Raises:
        FileNotFoundError: no such configuration.
        ValueError: not a mapping, or two levels of extension.
    """
    file = find_config(name)
    values = read_yaml(file)
    if "extends" not in values:
        return [(str(file), values)]
    extended = str(values.pop("extends"))
    beside = file.parent / extended
    base = beside if beside.is_file() else find_config(extended)
    inherited = read_yaml(base)
    if "extends" in inherited:
        raise ValueError(f"{file}: extends {extended}, which itself extends {inherited['extends']}; expected one level")
    return [(str(base), inherited), (str(file), values)]


def from_layers(kind: type[Kind], layers: Sequence[Layer]) -> Kind:
    """The configuration of all ``layers``, of which later ones win; ValueError says which brought what is wrong."""
    merged: dict[str, Any] = {}
    for _, values in layers:
        merged |= values
    try:
        return kind.from_dict(merged)
    except ValueError as error:
        raise ValueError(f"{blamed(kind, layers, str(error))}: {error}") from None


def blamed(kind: type[Config], layers: Sequence[Layer], message: str) -> str:
    """The first layer with which there is the error ``message``."""
    merged: dict[str, Any] = {}
    for place, values in layers:
        merged |= values
        try:
            kind.from_dict(merged)
        except ValueError as error:
            if str(error) == message:
                return place
    return layers[-1][0]


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; errors as for :func:`read_layers`."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of settings, got {type(values).__name__}")
    return values


def parse_value(text: str) -> Any:
    """A number, true, false, null, [list], {mapping} or "quoted text" as in a YAML file; all else is text."""
    quoted = text.startswith(("[", "{", '"', "'"))
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        if quoted:
            raise ValueError(f"{text!r} is not valid YAML: {' '.join(str(error).split())}") from None
        return text
    return value if text and (quoted or value is None or isinstance(value, (bool, int, float))) else text


def parse_pairs(pairs: Iterable[str], kind: type[Config] | None = None) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, the values as :func:`parse_value` reads them; those of ``kind``'s texts stay as they are.

    Raises ValueError for what is no pair.
    """
    texts = {name for name, hint in (get_type_hints(kind) if kind else {}).items() if hint is str}
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not NAME=VALUE")
        values[name] = value if name in texts else parse_value(value)
    return values

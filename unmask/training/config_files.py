"""Settings from YAML files, the packaged ones by name, and from ``NAME=VALUE`` pairs."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from unmask.config import Config
from unmask.text import read_text

CONFIGS = Path(__file__).parent / "configs"

Kind = TypeVar("Kind", bound=Config)
Layer = tuple[str, Mapping[str, Any]]
"""The origin of settings, and the settings."""


class Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, although YAML 1.1 requires a decimal point."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in YAML, but a key may stand only once."""
        keys = [key.value for key, _ in node.value]
        if twice := [key for key, _ in node.value if keys.count(key.value) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0].value} is set twice", twice[-1].start_mark)
        return super().construct_mapping(node, deep)


NOTHING = ("null", "Null", "NULL", "~")
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def packaged_configs(folder: Path = CONFIGS) -> list[str]:
    """Names of the configurations that come with the package; ``folder`` is that of their kind."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def find_config(name: str | Path, folder: Path = CONFIGS) -> Path:
    """The file ``name``, or the packaged configuration of that name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = packaged_configs(folder)
    if str(name) in known:
        return folder / f"{name}.yaml"
    raise FileNotFoundError(f"no configuration file {str(name)!r}; packaged ones are {', '.join(known)}")


def read_layers(name: str | Path, above: Sequence[Path] = (), folder: Path = CONFIGS) -> list[Layer]:
    """The layers of the configuration ``name``: those of the one that its key ``extends`` names, then its own.

    ``extends`` is a file, relative to this one, or a packaged name. ``above``: the files that extend this one.
    Raises FileNotFoundError for a missing configuration, ValueError if it is no mapping or extends itself.
    """
    beside = above[-1].parent / name if above else Path(name)
    file = beside if beside.is_file() else find_config(name, folder)
    if file.resolve() in [one.resolve() for one in above]:
        raise ValueError(f"{file}: extends itself")
    values = read_yaml(file)
    extended = values.pop("extends", None)
    return [*(read_layers(str(extended), (*above, file), folder) if extended else ()), (str(file), values)]


def from_layers(kind: type[Kind], layers: Sequence[Layer]) -> Kind:
    """The configuration of all ``layers``, of which later ones win; ValueError names the layer with the mistake."""
    merged = list(accumulate((dict(values) for _, values in layers), operator.or_))
    if message := mistake(kind, merged[-1]):
        place = next(p for (p, _), values in zip(layers, merged, strict=True) if mistake(kind, values) == message)
        raise ValueError(f"{place}: {message}")
    return kind.from_dict(merged[-1])


def mistake(kind: type[Config], values: Mapping[str, Any]) -> str:
    """The error of a ``kind`` with these ``values``; "" if there is none."""
    try:
        kind.from_dict(values)
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; errors as for :func:`read_layers`."""
    try:
        values = yaml.load(read_text(file), Loader) or {}
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of settings, got {type(values).__name__}")
    return values


QUOTED = ("[", "{", '"', "'")
"""How a value begins that is not a plain word."""


def parse_value(text: str) -> Any:
    """A number, true, false, null, [list], {mapping} or "quoted text" as in a YAML file; all else is text."""
    quoted = text.startswith(QUOTED)
    try:
        value = yaml.load(text, Loader)
    except (yaml.YAMLError, RecursionError) as error:
        if quoted:
            raise ValueError(f"{text!r} is not valid YAML: {' '.join(str(error).split())}") from None
        return text
    return value if text and (quoted or value is None or isinstance(value, (bool, int, float))) else text


def parse_pairs(pairs: Iterable[str], kind: type[Config] | None = None) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, the values read by :func:`parse_value`, unless the field of ``kind`` is a text.

    Of a list of texts, one may be given as it is. Raises ValueError for what is no pair.
    """
    hints = get_type_hints(kind) if kind else {}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ValueError(f"{pair!r} is not NAME=VALUE")
        kind_of, quoted = hints.get(name), value.startswith(QUOTED)
        plain = kind_of is str or (kind_of == tuple[str, ...] and not quoted)
        plain = plain or (kind_of == str | None and not quoted and value not in NOTHING)
        values[name] = value if plain else parse_value(value)
    return values

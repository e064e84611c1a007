"""Configurations: frozen dataclasses whose fields pydantic checks, with errors of one line.

A field's type says what is accepted, by one of the names below where ``int`` or ``float`` would be too wide, and the
docstring under it is its help on the command line.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self, dataclass_transform

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Chance = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
BlockLength = Annotated[PositiveInt | None, BeforeValidator(lambda value: None if value == "full" else value)]
"""Tokens per block; None, also written "full", is one block (full diffusion)."""


def effective_blocks(block_length: int | None, length: int) -> int:
    """Tokens per block of a buffer of ``length``; 0, full diffusion, where one block holds them all."""
    return 0 if block_length is None or block_length >= length else block_length


def ordered(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError("a pair (low, high) with 0 <= low <= high")
    return values


Range = Annotated[tuple[NonNegative, ...], AfterValidator(ordered)]

# Strict: a bool is no number and a text no number either; what files and command lines say is parsed before.
CHECKS = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, arbitrary_types_allowed=True)

WORDS = {
    "value_error": "{error}", "int_type": "an integer", "float_type": "a number", "bool_type": "true or false",
    "string_type": "a text", "tuple_type": "a list", "dict_type": "a mapping", "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
    "string_too_short": "a text that is not empty",
}  # fmt: skip
"""What was expected, for pydantic's types of errors; its own words for all others."""


class InvalidConfig(ValueError):
    """What is wrong with a configuration, by field."""


class UnknownName(TypeError, ValueError):
    """A name that a configuration does not have: as an argument a TypeError, in a file a ValueError."""


@dataclass_transform(frozen_default=True)
class Config:
    """Base of all configurations: a subclass is a frozen dataclass that raises ValueError for what does not fit.

    The message names the field, what was expected and the value; an unknown name raises :class:`UnknownName` with the
    nearest known one. NumPy's numbers count as numbers, and lists as tuples.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Names of earlier versions or other libraries and what takes their place here, for the message."""

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Any]]
        __pydantic_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, kw_only: bool = False) -> None:
        dataclass(frozen=True, kw_only=kw_only, repr=False, config=CHECKS)(cls)
        build = cls.__init__

        @functools.wraps(build)
        def init(self: Any, *values: Any, **named: Any) -> None:
            try:
                build(self, *map(plain, values), **{name: plain(value) for name, value in named.items()})
            except ValidationError as error:
                raise explained(error, cls) from None

        cls.__init__ = init  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """The fields that are not at their defaults."""
        made = {f.name: f.default_factory() for f in fields(self) if callable(f.default_factory)}
        defaults = {f.name: f.default for f in fields(self)} | made
        changed = (f"{n}={getattr(self, n)!r}" for n, value in defaults.items() if getattr(self, n) != value)
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these fields, of a file for instance."""
        return cls(**{str(name): value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """What :meth:`from_dict` reads, in JSON's terms."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def updated(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with some fields replaced."""
        return replace(self, **overrides) if overrides else self


def require(holds: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless it ``holds``; for what several fields must have in common."""
    if not holds:
        raise ValueError(message)


def plain(value: Any) -> Any:
    """A number or an array of NumPy or torch as Python's, a list as a tuple; all else as it is."""
    if type(value).__module__ in ("numpy", "torch") and hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(map(plain, value)) if type(value) in (list, tuple) else value


def checked(name: str, value: Any, kind: Any) -> Any:
    """``value`` if it is a ``kind``, such as :data:`PositiveInt`; ValueError names it otherwise."""
    try:
        return adapter(kind).validate_python(plain(value))
    except ValidationError as error:
        raise ValueError(described(name, error.errors())) from None


@functools.cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True))


def check_known(names: Iterable[str], known: Iterable[str], what: str, renamed: Mapping[str, str] = {}) -> None:
    """Raise :class:`UnknownName` for ``names`` that are not ``known``; ``what`` are they, "SamplerConfig fields"."""
    known = list(known)
    if unknown := sorted({str(name) for name in names} - set(known)):
        close = {old: difflib.get_close_matches(old, known, n=1) for old in unknown}
        hints = [f"for {old} use {renamed[old]}" for old in unknown if old in renamed]
        hints += [f"did you mean {new[0]}?" for old, new in close.items() if new and old not in renamed]
        raise UnknownName(f"unknown {what} {unknown}; {', '.join(hints) or 'known are ' + ', '.join(known)}")


def explained(error: ValidationError, cls: type[Config]) -> ValueError:
    """What pydantic says of ``cls``, in one line."""
    known = [f.name for f in fields(cls)]
    by_field: dict[str, list[Any]] = {}
    for entry in error.errors(include_url=False):
        place = entry["loc"][0] if entry["loc"] else ""
        name = place if isinstance(place, str) else (known[place] if place < len(known) else f"argument {place}")
        by_field.setdefault(name, []).append(entry)
    try:
        unknown = [name for name, found in by_field.items() if found[0]["type"] == "unexpected_keyword_argument"]
        check_known(unknown, known, f"{cls.__name__} fields", cls.RENAMED)
    except UnknownName as unknown_name:
        return unknown_name
    return InvalidConfig("; ".join(described(name, found) for name, found in by_field.items()))


def described(name: str, errors: list[Any]) -> str:
    """What is wrong with the value of ``name``, of which all alternatives of its type may have said something."""
    errors = [e for e in errors if e["type"] != "too_short" or len(errors) == 1]  # it is, without what is wrong in it
    within = [e for e in errors if not isinstance(e["input"], tuple)]  # what is wrong in a list, not that it is one
    errors = within or errors
    first = min(errors, key=lambda entry: len(entry["loc"]))
    if not name:  # of __post_init__, which finds words of its own
        return str(first["ctx"]["error"])
    if first["type"].startswith("missing"):
        return f"{name} is missing"
    if isinstance(inner := first.get("ctx", {}).get("error"), InvalidConfig):  # of a configuration in this one
        return f"{name}: {inner}"
    wanted = dict.fromkeys(
        WORDS[entry["type"]].format(**entry.get("ctx", {}))
        if entry["type"] in WORDS
        else entry["msg"].rpartition(" should be ")[2]
        for entry in errors
    )
    return f"{name} must be {' or '.join(wanted)}, got {first['input']!r}"

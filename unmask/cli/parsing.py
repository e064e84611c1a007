"""Command lines from dataclasses, by tyro: fields are options, their docstrings the help, mistakes one line."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import field, fields, make_dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from unmask.config import Config
from unmask.sampling.config import SamplerConfig
from unmask.training.config_files import parse_pairs, parse_value


class Command(Config):
    """A command: its fields are its options, :meth:`run` does it and returns the exit status."""

    REST: ClassVar[str] = ""
    """The positional field that also takes words behind options; "" if there is none."""

    def run(self) -> int:
        raise NotImplementedError


Kind = TypeVar("Kind", bound=Command)
if TYPE_CHECKING:
    Flag = bool
else:
    Flag = tyro.conf.FlagCreatePairsOff[bool]
    """An option without a value, and without its opposite."""

STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
REGISTRY = ConstructorRegistry()
MARKUP = re.compile(r"(?::\w+:)?`+([^`]*)`+")
"""Of docstrings: the text in it is help enough."""


def alternatives(hint: Any) -> list[Any]:
    """The types that ``hint`` stands for, without None and annotations."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [one for part in get_args(hint) for one in alternatives(part) if one is not type(None)]
    return [hint]


def metavar(hint: Any) -> str | None:
    """How the help shows values of ``hint``: numbers and choices; None for all else."""
    shown = {int: "INT", float: "FLOAT"}
    parts = [
        "{" + ",".join(map(str, get_args(one))) + "}" if get_origin(one) is Literal else shown.get(one)
        for one in alternatives(hint)
    ]
    return "|".join(map(str, parts)) if all(parts) else None


@REGISTRY.primitive_rule
def as_yaml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Numbers and choices are read as in a YAML file; whether they fit is for the configuration to say."""
    shown = metavar(info.type)
    if shown is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=shown,
        instance_from_str=lambda words: parse_value(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def options_of(kind: type[Config], doc: str, names: Sequence[str] = ()) -> Any:
    """A dataclass with the fields of ``kind`` (those in ``names``, if any) as options, None where not given."""
    hints = get_type_hints(kind)
    made = []
    for f in fields(kind):
        if names and f.name not in names:
            continue
        is_flag = alternatives(hints[f.name]) == [bool]
        kinds = (vars(one).get("__pydantic_fields__", {}) for one in kind.__mro__)
        doc_of = next(
            (known[f.name].description for known in kinds if getattr(known.get(f.name), "description", "")), ""
        )
        conf = arg(
            help=" ".join(MARKUP.sub(r"\1", doc_of).split()),
            metavar=None if is_flag else metavar(hints[f.name]) or "VALUE",
            help_behavior_hint="" if f.default is None or callable(f.default_factory) else f"(default: {f.default})",
        )
        option: Any = Annotated[bool | None if is_flag else str | None, conf]
        made.append((f.name, option, field(default=None)))
    return make_dataclass(f"{kind.__name__}Options", made, frozen=True, namespace={"__doc__": doc})


def given(options: Any, kind: type[Config]) -> dict[str, Any]:
    """The fields of ``kind`` that the command line sets, as :func:`options_of` has them."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    flags = {name: value for name, value in values.items() if isinstance(value, bool)}
    return flags | parse_pairs((f"{name}={value}" for name, value in values.items() if isinstance(value, str)), kind)


def parse(kind: type[Kind], arguments: Sequence[str], prog: str) -> Kind:
    """The ``kind`` that ``arguments`` spell. Raises ValueError for what they may not say, SystemExit after --help."""

    def ask(args: Sequence[str] = arguments, **settings: Any) -> Any:
        return tyro.cli(kind, args=args, prog=prog, config=STYLE, registry=REGISTRY, **settings)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made, rest = ask(return_unknown_args=True)
            if rest and kind.REST and not any(word.startswith("-") for word in rest):
                return made.updated({kind.REST: (*getattr(made, kind.REST), *rest)})
            return ask() if rest else made
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(unknown_option(ask, arguments) or reason(stop, said.getvalue())) from None


def unknown_option(ask: Callable[..., Any], arguments: Sequence[str]) -> str:
    """What to say of the first option in ``arguments`` that is none by the help of ``ask``; "" if all are known."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        ask(args=["--help"])
    known = re.findall(r"^[│| ]*(--[\w-]+)", said.getvalue(), re.MULTILINE)
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if re.match(r"--\w", option) and option.replace("--no-", "--", 1) not in [*known, "--help"]:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            renamed = {**SamplerConfig.RENAMED, "policy": ""} if "--max-new-tokens" in known else {}
            place = renamed.get(option[2:].replace("-", "_"))
            return f"unknown option {option}{f'; use {place}' if place else hint}"
    return ""


def reason(stop: SystemExit, printed: str) -> str:
    """Why tyro stopped: what a configuration said, else the text in the box that it printed, in one line."""
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, ValueError):
            return str(cause)
        cause = cause.__context__
    rows = [row.strip("│| ") for row in printed.splitlines()[1:]]
    return " ".join(row for row in rows if row.strip("─-╰╯+")).partition(" For full helptext")[0]

"""Values that cross between the tests and the program, as JSON: plain data, by what it holds.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package. Nothing that is
decoded runs code of the other side: what arrives is built from a fixed list of types.
"""

import builtins
import importlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

PROGRAM = "solution"
"""The name of the program's module."""

IMMUTABLE: dict[str, Callable[[Any], list[Any]]] = {
    "builtins.complex": lambda v: [v.real, v.imag],
    "builtins.range": lambda v: [v.start, v.stop, v.step],
    "fractions.Fraction": lambda v: [v.numerator, v.denominator],
    "decimal.Decimal": lambda v: [str(v)],
    "datetime.date": lambda v: [v.year, v.month, v.day],
    "datetime.time": lambda v: [v.hour, v.minute, v.second, v.microsecond],
    "datetime.datetime": lambda v: [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond],
    "datetime.timedelta": lambda v: [v.days, v.seconds, v.microseconds],
}
"""Types made anew from arguments, and the arguments."""

VIEWS: dict[str, Callable[[list[Any]], Any]] = {
    "builtins.dict_keys": lambda items: dict.fromkeys(items).keys(),
    "builtins.dict_values": lambda items: dict(enumerate(items)).values(),
    "builtins.dict_items": lambda items: dict(items).items(),
}
DERIVABLE: dict[str, Callable[[Any], Any]] = {
    "builtins.int": int.__int__,
    "builtins.float": float.__float__,
    "builtins.str": str.__str__,
    "builtins.tuple": lambda v: tuple(tuple.__iter__(v)),
}
"""Types whose subclasses (enumerations, named tuples) cross with a reference to the object, and its plain value."""
FROZEN = ("builtins.tuple", "builtins.frozenset")
MAPPINGS = ("builtins.dict", "collections.Counter", "collections.OrderedDict")
MUTABLE = ("builtins.list", "builtins.set", "builtins.bytearray", "collections.deque", *MAPPINGS)
BASES = (int, float, str, bytes, bytearray, complex, list, tuple, set, frozenset, dict)
TYPES = (int, float, str, bytes, bytearray, bool, complex, list, tuple, set, frozenset, dict, range)
"""Types that the program may name to the tests."""


class CannotGrade(BaseException):
    """The tests use the program in a way that cannot be carried: says nothing about the program.

    Not an Exception, and noted in ``reasons``: no test may swallow it.
    """

    reasons: ClassVar[list[str]] = []

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reasons.append(reason)


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class Crossing:
    """The values of one call and of its answer, as one of the two sides sees them.

    Mutable containers are numbered in the order in which they are met, which is the same on both sides. So one that
    is met twice stays one, and :meth:`changes` can say what the called side has done to the caller's.
    ``strict`` refuses subclasses of plain types; otherwise they become that type, or one derived from it.
    ``send_other`` and ``take_other`` encode and decode what is not plain data.
    """

    def __init__(self, send_other: Callable[[Any], Any], take_other: Callable[[str, Any], Any], strict: bool) -> None:
        self.send_other, self.take_other, self.strict = send_other, take_other, strict
        self.shared: list[Any] = []
        self.numbers: dict[int, int] = {}

    def share(self, container: Any) -> None:
        self.numbers[id(container)] = len(self.shared)
        self.shared.append(container)

    def encode(self, value: Any) -> Any:
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            value = value.item()
        if type(value) in (str, bool, float, type(None)):
            return value
        if type(value) is int:
            return {"int": format(value, "x")}
        if id(value) in self.numbers:
            return {"same": self.numbers[id(value)]}
        kind = self.kind_of(value)
        if not self.strict and alters(value):
            return {"altered": name_of(type(value))}
        if kind in DERIVABLE and kind != name_of(type(value)):
            plain = DERIVABLE[kind](value)
            return {"derived": [self.encode(plain), *self.send_other(value).values()]}
        if kind == "builtins.bytes":
            return {"bytes": value.hex()}
        if kind in MUTABLE:
            self.share(value)
        if kind in MUTABLE or kind in FROZEN or kind in VIEWS:
            return {kind: self.inside(value)}
        if kind in IMMUTABLE:
            return {kind: [self.encode(v) for v in IMMUTABLE[kind](value)]}
        return self.send_other(value)

    def kind_of(self, value: Any) -> str:
        """The type to send ``value`` as, or the name of a type that is not plain data."""
        name = name_of(type(value))
        if name in IMMUTABLE and getattr(value, "tzinfo", None) is not None:
            return "a time with a zone"
        if self.strict and name == "collections.deque" and value.maxlen is not None:
            return "a bounded deque"
        known = name in IMMUTABLE or name in MUTABLE or name in VIEWS
        return name if known or self.strict else name_of(base_of(value))

    def inside(self, value: Any) -> Any:
        """What a container holds."""
        if isinstance(value, bytearray):
            return value.hex()
        if isinstance(value, dict):
            pairs = OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value)
            return [[self.encode(k), self.encode(v)] for k, v in pairs]
        kind: Any
        for kind in (list, tuple, set, frozenset):
            if isinstance(value, kind):
                return [self.encode(v) for v in kind.__iter__(value)]
        return [self.encode(v) for v in value]

    def decode(self, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        ((kind, body),) = message.items()
        if kind == "same":
            return self.shared[body]
        if kind == "derived":
            return self.take_other(kind, [self.decode(body[0]), body[1]])
        if kind == "int":
            return int(body, 16)
        if kind == "bytes":
            return bytes.fromhex(body)
        if kind in MUTABLE:
            self.share(container := made(kind))
            self.fill(container, body)
            return container
        if kind in FROZEN:
            return made(kind, (self.decode(v) for v in body))
        if kind in VIEWS:
            return VIEWS[kind]([self.decode(v) for v in body])
        if kind in IMMUTABLE:
            return made(kind, *(self.decode(v) for v in body))
        return self.take_other(kind, body)

    def fill(self, container: Any, body: Any) -> None:
        """Put into a container what :meth:`inside` has told of it."""
        if isinstance(container, bytearray):
            container[:] = bytes.fromhex(body)
        elif isinstance(container, dict):
            pairs = [(self.decode(k), self.decode(v)) for k, v in body]
            container.clear()
            for key, value in pairs:
                container[key] = value
        else:
            items = [self.decode(v) for v in body]
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(items)

    def states(self) -> list[Any]:
        """What the containers met so far hold now."""
        return [self.inside(container) for container in tuple(self.shared)]

    def changes(self, before: list[Any]) -> list[Any]:
        """The number and the content of each container of the caller that is not as it was ``before``."""
        after = [self.inside(container) for container in self.shared[: len(before)]]
        return [[i, now] for i, (then, now) in enumerate(zip(before, after, strict=True)) if then != now]

    def apply(self, changes: list[Any]) -> None:
        for number, body in changes:
            self.fill(self.shared[number], body)


def base_of(value: Any) -> type:
    """The plain type that the type of ``value`` is, or is a subclass of; without one, its type."""
    return next((kind for kind in BASES if isinstance(value, kind)), type(value))


def alters(value: Any) -> bool:
    """Whether a subclass of a plain type gives ``value`` what its plain value lacks or does otherwise."""
    base = base_of(value)
    if type(value) is base:
        return False
    names = {name for kind in type(value).__mro__ if kind.__module__ == PROGRAM for name in own_names(kind)}
    if name_of(base) in DERIVABLE:  # its texts and further attributes are asked of the object
        names -= {"__repr__", "__str__", "__getattr__"}
        return any(name.startswith("__") or hasattr(base, name) for name in names)
    return any(name.startswith("__") or not name.startswith("_") for name in {*names, *getattr(value, "__dict__", ())})


def own_names(kind: type) -> set[str]:
    """What a class of the program defines itself, but how its objects are made; special names only if functions."""
    special = {n for n, member in vars(kind).items() if getattr(member, "__module__", None) == PROGRAM}
    special -= {"__init__", "__new__", "__init_subclass__", "__annotate_func__"}
    return special | {name for name in vars(kind) if not name.startswith("__")}


def made(kind: str, *arguments: Any) -> Any:
    module, _, name = kind.rpartition(".")
    return getattr(importlib.import_module(module), name)(*arguments)


def named_builtin(value: Any) -> str | None:
    """The name under which ``value`` is a builtin function or type."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) and getattr(builtins, name, None) is value else None

"""What the tests hold of the program: proxies of its objects and exceptions, and its names.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package.
"""

import builtins
import copy
import functools
import importlib
import math
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmask.tasks.sandbox_calls import Client
    from unmask.tasks.sandbox_data import CannotGrade
else:
    from sandbox_data import CannotGrade

TESTS = "tests"
"""The name of the tests' module."""

COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
ARITHMETIC = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift",
)  # fmt: skip
OPERATORS = [f"__{name}__" for name in (*COMPARISONS, *ARITHMETIC, *(f"i{name}" for name in ARITHMETIC))]
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "__len__": len,
    "__bool__": bool,
    "__str__": str,
    "__repr__": repr,
    "__format__": format,
    "__hash__": hash,
    "__next__": next,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__delattr__": delattr,
    "__reversed__": lambda value: list(reversed(value)),
    "__neg__": operator.neg,
    "__pos__": operator.pos,
    "__invert__": operator.invert,
    "__abs__": abs,
    "__int__": int,
    "__float__": float,
    "__complex__": complex,
    "__index__": operator.index,
    "__round__": round,
    "__floor__": math.floor,
    "__ceil__": math.ceil,
    "__copy__": copy.copy,
    "__deepcopy__": lambda value, memo: copy.deepcopy(value),
}


class Remote:
    """Something in the program that is not plain data.

    What the tests do to it alone, or to it and another one, the program does. But where they hold it against a value
    of their own, the program must not see that value and answer: that is not graded, unless the object's class leaves
    the operation as it is for all objects. Its type is a subclass of this, made by :func:`proxy_class`.
    """

    __slots__ = ("__place", "__side")

    __kind: str
    """The name of the object's type."""

    def __init__(self, side: "Client", place: int) -> None:
        object.__setattr__(self, "_Remote__side", side)
        object.__setattr__(self, "_Remote__place", place)

    def __getattribute__(self, name: str) -> Any:
        if name in ("__doc__", "__module__"):
            return side_of(self).ask("getattr", self, name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__array"):
            raise CannotGrade("the tests hand an object of the program to numpy")
        if name == "__mro_entries__":
            raise CannotGrade("the tests make a subclass of a class of the program")
        return side_of(self).ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        side_of(self).ask("setattr", self, name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        if issubclass(type(instance), Derived):
            instance = instance._remote
        return is_remote(instance) and side_of(self).ask("isinstance", instance, self) is True

    def __subclasscheck__(self, kind: Any) -> bool:
        return is_remote(kind) and side_of(self).ask("issubclass", kind, self) is True

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For isinstance: the object's type where that is one of the standard library's."""
        return known_type(kind_of(self)) or type(self)


def is_remote(value: Any) -> bool:
    return issubclass(type(value), Remote)


def side_of(remote: Remote) -> "Client":
    return object.__getattribute__(remote, "_Remote__side")


def place_of(remote: Remote) -> int:
    return object.__getattribute__(remote, "_Remote__place")


def kind_of(remote: Remote) -> str:
    return object.__getattribute__(remote, "_Remote__kind")


def known_type(name: str) -> type | None:
    if name == "builtins.coroutine":
        raise CannotGrade("the tests await the program")
    module, _, short = name.rpartition(".")
    hidden = {kind.__qualname__: kind for kind in vars(types).values() if isinstance(kind, type)}
    found = getattr(sys.modules.get(module), short, hidden.get(short) if module == "builtins" else None)
    return found if isinstance(found, type) else None


def call(self: Remote, *args: Any, **kwargs: Any) -> Any:
    return side_of(self).ask("call", self, args, kwargs)


def pieces(side: "Client", iterator: Any) -> Iterator[Any]:
    """The items of the program's ``iterator``: the first hundred one at a time, as it may have no end."""
    taken = 0
    while True:
        size = 1 if taken < 100 else 1000
        items = side.ask("take", iterator, size)
        yield from items
        taken += len(items)
        if len(items) < size:
            return


def method(name: str) -> Callable[..., Any]:
    return lambda self, *operands: self.__getattr__(name)(*operands)


def refused(reason: str) -> Callable[..., Any]:
    def method(self: Remote, *operands: Any) -> Any:
        raise CannotGrade(reason)

    return method


def forwarded(name: str) -> Callable[..., Any]:
    return lambda self, *operands: side_of(self).ask(name, self, *operands)


def between(name: str) -> Callable[..., Any]:
    def method(self: Remote, other: Any) -> Any:
        if is_remote(other):
            return side_of(self).ask(name, self, other)
        if side_of(self).ask("defines", self, name):
            raise CannotGrade(f"the tests use {name} of an object of the program and a value of their own")
        return NotImplemented

    return method


UNIVERSAL = ("__str__", "__repr__", "__format__", "__hash__", "__delattr__", "__copy__", "__deepcopy__")
for _name in UNIVERSAL:
    setattr(Remote, _name, forwarded(_name))
for _name in (*OPERATORS, *(f"__r{name}__" for name in ARITHMETIC)):
    setattr(Remote, _name, between(_name))

OPTIONAL: dict[str, Callable[..., Any]] = {
    **{name: forwarded(name) for name in FUNCTIONS if name not in UNIVERSAL},
    "__call__": call,
    "__iter__": lambda self: pieces(side_of(self), side_of(self).ask("iter", self)),
    "__contains__": refused("the tests look for a value in an object of the program"),
    "__enter__": method("__enter__"),
    "__exit__": method("__exit__"),
    "__await__": refused("the tests await the program"),
}
"""Operations of the proxies of those objects whose class has them."""


def special(kind: type, name: str) -> Any:
    """What Python finds of a special name for objects of type ``kind``: not what its metaclass has."""
    return next((vars(owner)[name] for owner in kind.__mro__ if name in vars(owner)), None)


def optional_of(value: Any) -> list[str]:
    """The operations among ``OPTIONAL`` that ``value`` has."""
    generic = isinstance(value, type) and hasattr(value, "__class_getitem__")
    found = [name for name in OPTIONAL if special(type(value), name) is not None]
    return [*found, "__getitem__"] if generic else found


@functools.cache
def proxy_class(kind: str, names: tuple[str, ...]) -> type[Remote]:
    """The type of proxies of objects of the type named ``kind`` with the optional operations ``names``."""
    body = {"__slots__": (), "_Remote__kind": kind, **{name: OPTIONAL[name] for name in names}}
    return type(kind.rpartition(".")[2], (Remote,), body)


class Derived:
    """What plain values of the program's own classes are to the tests: further attributes are in the program."""

    _remote: Remote

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def __repr__(self) -> str:
        return repr(self._remote)

    def __str__(self) -> str:
        return str(self._remote)


DERIVED = {kind: type(f"Derived {kind.__name__}", (Derived, kind), {}) for kind in (int, float, str, tuple)}


def derived(plain: Any, remote: Remote) -> Any:
    value = DERIVED[type(plain)](plain)
    value._remote = remote
    return value


class ProgramError(Exception):
    """What all exceptions of the program's own classes are to the tests."""

    _text: str | None = None
    _remote: Remote | None = None

    def __str__(self) -> str:
        return super().__str__() if self._text is None else self._text

    def __getattr__(self, name: str) -> Any:
        if self._remote is None:
            raise CannotGrade(f"the tests use {name} of an exception of the program that they made themselves")
        return getattr(self._remote, name)


class Names(dict[str, Any]):
    """Globals of the tests: a name that they and the builtins lack is looked up in the program.

    ``entry_points`` are looked up there even if they are builtins or modules of the standard library. Other such
    modules, which the tests need not import where the program may, are the judge's own.
    """

    def __init__(self, client: "Client", entry_points: list[str]) -> None:
        super().__init__(__name__=TESTS)
        self.client, self.entry_points = client, entry_points

    def __missing__(self, name: str) -> Any:
        if name not in self.entry_points:
            if name.startswith("__") or hasattr(builtins, name):
                raise KeyError(name)
            if name in sys.stdlib_module_names:
                return importlib.import_module(name)
        try:
            value = self.client.ask("global", name)
        except KeyError as error:  # which would mean: look in the builtins
            raise NameError(f"name {name!r}: {error!r}") from None
        if is_remote(value) and kind_of(value) == "builtins.module":
            raise CannotGrade(f"the tests use the module {name} of the program")
        return value

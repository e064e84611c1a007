"""Calls between the tests and the program, across a process boundary, as plain data.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package. The tests hold
:class:`~unmask.tasks.sandbox_remote.Remote` proxies of what is not plain data; the program's process runs
:func:`serve`, where functions of the tests are proxies. Each side waits for the other, so calls nest to any depth.
Nothing that arrives from the program is ever executed or unpickled.
"""

import builtins
import itertools
import json
import operator
import os
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from unmask.tasks.sandbox_data import PROGRAM, TYPES, CannotGrade, Crossing, name_of, named_builtin
    from unmask.tasks.sandbox_remote import (
        FUNCTIONS,
        OPERATORS,
        TESTS,
        Derived,
        ProgramError,
        Remote,
        derived,
        optional_of,
        place_of,
        proxy_class,
        special,
    )
else:
    from sandbox_data import PROGRAM, TYPES, CannotGrade, Crossing, name_of, named_builtin
    from sandbox_remote import (
        FUNCTIONS,
        OPERATORS,
        TESTS,
        Derived,
        ProgramError,
        Remote,
        derived,
        optional_of,
        place_of,
        proxy_class,
        special,
    )

MAX_MESSAGE = 1 << 24
"""Bytes of one answer of the program; a longer one fails the tests."""


class Gone(BaseException):
    """The candidate ended or broke the protocol. Not an Exception: no test may swallow it."""


def send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message).encode("ascii")
    channel.sendall(struct.pack("=I", len(data)) + data)


def receive(channel: socket.socket) -> Any:
    def exactly(count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = channel.recv(min(count - len(data), 1 << 16))
            if not part:
                raise Gone("the program ended before its tests did")
            data += part
        return bytes(data)

    (size,) = struct.unpack("=I", exactly(4))
    if size > MAX_MESSAGE:
        raise Gone("an answer is too long")
    return json.loads(exactly(size))


class Side:
    """One end of the channel: asks the other for operations, and answers what it asks meanwhile."""

    strict = False
    carried: type[BaseException] = BaseException
    """What an operation may raise for the other side to see; anything else ends this one."""
    operations: dict[str, Callable[..., Any]] = {}

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.objects: list[Any] = []
        self.places: dict[int, int] = {}

    def reference(self, value: Any) -> dict[str, int]:
        """A name for something that stays here; the same one each time."""
        if id(value) not in self.places:
            self.places[id(value)] = len(self.objects)
            self.objects.append(value)
        return {"mine": self.places[id(value)]}

    def crossing(self) -> Crossing:
        return Crossing(self.send_other, self.take_other, self.strict)

    def ask(self, operation: str, *operands: Any) -> Any:
        """The value of an operation of the other side, or its exception."""
        crossing = self.crossing()
        message = ["ask", operation, [crossing.encode(v) for v in operands]]
        try:
            send(self.channel, message)
            while (answer := receive(self.channel))[0] == "ask":
                self.answer(*answer[1:])
            outcome, body, changes = answer
            value = crossing.decode(body) if outcome == "value" else self.error(**body)
            crossing.apply(changes)
        except Exception as error:
            raise Gone(f"a malformed answer: {type(error).__name__}: {error}") from None
        if outcome == "value":
            return value
        raise value

    def answer(self, operation: str, operands: list[Any]) -> None:
        """Carry out one operation for the other side."""
        crossing, before = self.crossing(), []
        try:
            values = [crossing.decode(v) for v in operands]
            before = crossing.states()
            outcome = ["value", crossing.encode(self.operations[operation](*values))]
        except self.carried as error:
            outcome = ["error", self.told(error)]
        send(self.channel, [*outcome, crossing.changes(before)])

    def told(self, error: BaseException) -> dict[str, Any]:
        """What the other side hears of an exception."""
        text, args, noted = "", None, len(CannotGrade.reasons)
        try:
            text = str(error)[:500]
            args = self.crossing().encode(tuple(error.args))
        except (Exception, CannotGrade):  # less of the exception is heard: no reason not to grade
            del CannotGrade.reasons[noted:]
        return {"names": [name_of(kind) for kind in type(error).__mro__], "text": text, "args": args}

    def error(self, names: list[str], text: str, args: Any) -> BaseException:
        """The exception that the other side has told of."""
        kind = self.error_class(names)
        if kind is RuntimeError and names[0] != name_of(RuntimeError):
            return kind(f"{names[0].rpartition('.')[2]}: {text}")
        try:
            return kind(*((text,) if args is None else self.crossing().decode(args)))
        except Exception:  # it is not made from its args
            return RuntimeError(text)

    def error_class(self, names: list[str]) -> type[Exception]:
        """The first builtin class of an exception's, given from itself to its remotest ancestor."""
        kinds = (getattr(builtins, name[9:], None) for name in names if name.startswith("builtins."))
        return next((k for k in kinds if isinstance(k, type) and issubclass(k, Exception)), RuntimeError)

    def send_other(self, value: Any) -> Any:
        raise NotImplementedError

    def take_other(self, kind: str, body: Any) -> Any:
        raise NotImplementedError


class Client(Side):
    """The judge's side. All that the program may ask of it is to call a function that the tests have handed out."""

    strict, carried = True, Exception
    operations = {"call": lambda function, args, kwargs: function(*args, **kwargs)}

    def __init__(self, channel: socket.socket) -> None:
        super().__init__(channel)
        self.calls = 0
        self.raised: list[BaseException] = []
        self.classes: dict[str, type[ProgramError]] = {}
        self.remotes: dict[int, Remote] = {}
        self.constants: dict[int, Any] = {}

    def ask(self, operation: str, *operands: Any) -> Any:
        self.calls += 1
        try:
            return super().ask(operation, *operands)
        except StopIteration as error:
            if operation == "__next__":
                raise
            raise RuntimeError("the program raised StopIteration") from error  # it would end a loop of the tests

    def send_other(self, value: Any) -> Any:
        kind = type(value)
        if issubclass(kind, Remote):
            return {"yours": place_of(value)}
        if issubclass(kind, Derived):
            return {"yours": place_of(value._remote)}
        if name := named_builtin(value):
            return {"builtin": name}
        if kind.__module__ in ("builtins", "itertools") and hasattr(kind, "__next__"):
            return {"iterator": self.reference(value.__next__)["mine"]}
        if callable(value) and not isinstance(value, type) and kind.__module__ != TESTS:
            return self.reference(value)
        raise CannotGrade(f"the tests hand a {name_of(kind)} to the program")

    def remote(self, place: int, kind: str, names: list[str]) -> Remote:
        """The proxy of an object of the program (see :func:`proxy_class`); the same one each time."""
        return self.remotes.setdefault(place, proxy_class(kind, tuple(names))(self, place))

    def take_other(self, kind: str, body: Any) -> Any:
        if kind == "object":
            return self.remote(*body)
        if kind == "derived":
            value = derived(body[0], self.remote(*body[1]))
            return value if isinstance(value, tuple) else self.constants.setdefault(body[1][0], value)
        if kind == "altered":
            raise CannotGrade(f"the program hands a {body} to the tests")
        if kind == "exception":
            return self.error_class(body)
        if kind == "builtin":
            return {known.__name__: known for known in TYPES}[body]
        if kind == "yours":
            return self.objects[body]
        raise ValueError(f"no {kind!r}")

    def told(self, error: BaseException) -> dict[str, Any]:
        self.raised.append(error)
        return {**super().told(error), "raised": len(self.raised) - 1}

    def error(self, names: list[str], text: str, args: Any, raised: Any = None, remote: Any = None) -> BaseException:
        if raised is not None:
            return self.raised[raised]
        error = super().error(names, text, args)
        if isinstance(error, ProgramError):
            error._text, error._remote = text, self.remote(*remote)
        return error

    def error_class(self, names: list[str]) -> type[Exception]:
        """An exception class of the program, as one here of the same name and builtin ancestor."""
        if names[0].startswith("builtins."):
            return super().error_class(names)
        if names[0] not in self.classes:
            base = self.error_class(names[1:])
            bases = (base,) if issubclass(base, ProgramError) else (ProgramError, base)
            self.classes[names[0]] = type(names[0].rpartition(".")[2], bases, {})
        return self.classes[names[0]]


class Server(Side):
    """The program's side."""

    def __init__(self, channel: socket.socket, program: str) -> None:
        super().__init__(channel)
        module = types.ModuleType(PROGRAM)
        sys.modules[PROGRAM], self.names = module, vars(module)
        self.lock = threading.RLock()
        self.functions: dict[int, Callable[..., Any]] = {}
        self.operations = {
            **OPERATIONS,
            "load": lambda: exec(compile(program, "<program>", "exec"), self.names),
            "global": self.lookup,
        }

    def lookup(self, name: str) -> Any:
        if name not in self.names:
            raise NameError(f"name {name!r} is not defined in the program")
        return self.names[name]

    def ask(self, operation: str, *operands: Any) -> Any:
        with self.lock:  # of the program's threads
            return super().ask(operation, *operands)

    def send_other(self, value: Any) -> Any:
        if any(value is kind for kind in TYPES):
            return {"builtin": value.__name__}
        for place, function in self.functions.items():
            if value is function:
                return {"yours": place}
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [name_of(kind) for kind in value.__mro__]}
        return {"object": self.described(value)}

    def described(self, value: Any) -> list[Any]:
        """What the judge makes a proxy of."""
        return [self.reference(value)["mine"], name_of(type(value)), optional_of(value)]

    def take_other(self, kind: str, body: Any) -> Any:
        if kind == "yours":
            return self.objects[body]
        if kind == "builtin":
            return getattr(builtins, body)
        if body not in self.functions:
            self.functions[body] = lambda *args, **kwargs: self.ask("call", self.functions[body], args, kwargs)
        return self.functions[body] if kind == "mine" else pulled(self.functions[body])

    def told(self, error: BaseException) -> dict[str, Any]:
        told = {**super().told(error), "remote": self.described(error)}
        return {**told, "raised": vars(error)["_raised"]} if "_raised" in vars(error) else told

    def error(self, names: list[str], text: str, args: Any, raised: int) -> BaseException:  # type: ignore[override]
        error = super().error(names, text, args)
        error._raised = raised  # type: ignore[attr-defined]
        return error


def pulled(step: Callable[[], Any]) -> Any:
    """An iterator of the tests, in the program."""
    while True:
        try:
            value = step()
        except StopIteration:
            return
        yield value


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "take": lambda iterator, count: list(itertools.islice(iterator, count)),
    "defines": lambda value, name: special(type(value), name) is not special(object, name),
    "isinstance": isinstance,
    "issubclass": issubclass,
    **{name: getattr(operator, name) for name in OPERATORS},
    **FUNCTIONS,
}


def serve(channel: socket.socket, program: str) -> NoReturn:
    """Run the program, then answer operations on what it defined, for as long as the judge lives."""
    server = Server(channel, program)
    while True:
        try:
            _, operation, operands = receive(channel)
        except BaseException:
            os._exit(0)
        server.answer(operation, operands)

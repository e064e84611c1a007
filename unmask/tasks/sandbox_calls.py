"""Calls from the tests to the program, across a process boundary, as plain data.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package. The tests hold
:class:`Remote` proxies; the program's process runs :func:`serve`. Nothing that arrives from there is ever executed or
unpickled.
"""

import builtins
import itertools
import json
import os
import socket
import struct
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

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


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """Plain data as JSON; ``other`` says what to send for the rest. Subclasses become their builtin type."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"int": format(int(value), "x")}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    kind: Any
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(v, other) for v in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, other), encode(v, other)] for k, v in dict.items(value)]}
    return other(value)


def decode(message: Any, other: Callable[[Any], Any]) -> Any:
    if not isinstance(message, dict):
        return message
    ((kind, body),) = message.items()
    if kind == "int":
        return int(body, 16)
    if kind == "bytes":
        return bytes.fromhex(body)
    if kind == "complex":
        return complex(*body)
    if kind == "dict":
        return {decode(k, other): decode(v, other) for k, v in body}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(v, other) for v in body)
    return other(message)


class Client:
    """The judge's end: sends one operation at a time and returns, or raises, what the program answers."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel, self.calls = channel, 0

    def do(self, operation: str, *operands: Any) -> Any:
        message = [operation, *(encode(v, self.outgoing) for v in operands)]
        self.calls += 1
        try:
            send(self.channel, message)
            outcome, answer = receive(self.channel)
            if outcome == "value":
                return decode(answer, lambda reference: Remote(self, reference))
            name, text = str(answer[0]), str(answer[1])
        except (ValueError, TypeError, RecursionError, OSError) as error:
            raise Gone(f"a malformed answer: {error}") from None
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
            kind, text = RuntimeError, f"{name}: {text}"
        raise kind(text)

    def outgoing(self, value: Any) -> Any:
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_reference")
        raise TypeError(f"the tests cannot hand a {type(value).__name__} to the program")


class Remote:
    """Something in the program that is not plain data. Equal to nothing but itself."""

    def __init__(self, client: Client, reference: Any) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_reference", reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._client.do("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._client.do("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._client.do("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._client.do("getitem", self, key)

    def __iter__(self) -> Any:
        return iter(self._client.do("list", self))

    def __next__(self) -> Any:
        return self._client.do("next", self)

    def __len__(self) -> int:
        return self._client.do("len", self)

    def __bool__(self) -> bool:
        return self._client.do("bool", self) is True


class Names(dict[str, Any]):
    """Globals of the tests: a name that they and the builtins lack is looked up in the program."""

    def __init__(self, client: Client, entry_points: list[str]) -> None:
        super().__init__({name: Remote(client, {"name": name}) for name in entry_points}, __name__="tests")
        self.client = client

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(builtins, name):
            raise KeyError(name)
        return self.client.do("global", name)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "list": lambda value: list(itertools.islice(value, 1 << 20)),
    "next": next,
    "len": len,
    "bool": bool,
}


def serve(channel: socket.socket, program: str) -> NoReturn:
    """Run the program, then answer operations on what it defined, for as long as the judge lives."""
    module = types.ModuleType("solution")
    sys.modules["solution"], names, objects = module, vars(module), []

    def reference(value: Any) -> Any:
        objects.append(value)
        return {"object": len(objects) - 1}

    def referent(message: Any) -> Any:
        ((kind, key),) = message.items()
        return objects[key] if kind == "object" else lookup(key)

    def lookup(name: str) -> Any:
        if name not in names:
            raise NameError(f"name {name!r} is not defined in the program")
        return names[name]

    OPERATIONS.update({"global": lookup, "load": lambda: exec(compile(program, "<program>", "exec"), names)})
    while True:
        try:
            operation, *operands = receive(channel)
        except BaseException:
            os._exit(0)
        try:
            value = OPERATIONS[operation](*(decode(v, referent) for v in operands))
            answer = ["value", encode(value, reference)]
        except BaseException as error:
            answer = ["error", [type(error).__name__, str(error)[:500]]]
        send(channel, answer)

"""The ``unmask`` command. One file per subcommand: parse, call the library, print."""

from __future__ import annotations

import difflib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module

from unmask.text import printable

COMMANDS = {
    "generate": "complete prompts and watch the buffer fill in",
    "trace": "write a page that plays a decoding step by step",
    "train": "learn a policy by rewards, or without (train set, train distill)",
    "chat": "talk with a model and watch its answers fill in",
    "evaluate": "accuracy against forwards, policy by policy",
    "compare": "paired differences between evaluated policies",
    "calibrate": "the forwards of a learned policy at each value of its dial",
    "plot": "draw accuracy over forwards, or training curves",
    "push": "upload a learned policy to the hub, with a model card",
    "bench": "what each operation costs here, against eager code",
    "models": "what is packaged, which families load, what a model's folder holds",
    "policies": "all rules and options, what a policy's folder holds",
    "info": "what was built and what this machine has",
}
MODULES = {"models": "info", "policies": "info", "train_distill": "train", "train_set": "train"}
"""Where a command is, if not in the module of its name."""
LONGEST = 1000
"""Characters of an error that are printed."""
HELP = """usage: unmask [-h] [--version] COMMAND ...

Decode masked diffusion language models with trained or hand-made unmasking policies.

commands:
{commands}

options:
  -h, --help  show this help, or that of a command
  --version   show the version
  --debug     (with any command) show a full traceback on errors

first steps:
  unmask generate                      watch the packaged model fill its buffer
  unmask generate "Reverse the line: Tom, Ann, Eve."
  unmask chat MODEL                    talk with an instruction-tuned model
  unmask models                        what is packaged, and settings of the families
  unmask train quickstart              train a policy in a few minutes
  unmask evaluate --problems 200       accuracy against forwards, policy by policy
  unmask info                          what was built and what this machine has"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with a one-line message and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # in a file, too, lines are in order
    first = words[0] if words else ""
    if first in ("-h", "--help", "--version"):
        return guarded("unmask", partial(about, first))
    if first not in COMMANDS:
        close = difflib.get_close_matches(first, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)} (unmask --help)"
        print(f"unmask: {f'unknown command {first!r}' if first else 'no command given'}; {hint}", file=sys.stderr)
        return 2
    if first == "train" and words[1:2] in (["distill"], ["set"]):
        first, words = f"train_{words[1]}", words[1:]
    words, debug = [word for word in words[1:] if word != "--debug"], "--debug" in words
    return guarded(f"unmask {first.replace('_', ' ')}", partial(run, first, words), debug)


def about(flag: str) -> int:
    """Print the version, or help."""
    from unmask import __version__

    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    print(f"unmask {__version__}" if flag == "--version" else HELP.format(commands=commands))
    return 0


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command called ``name``."""
    from unmask.cli.memory import keep_freed_memory
    from unmask.cli.parsing import parse

    keep_freed_memory()
    warnings.formatwarning = lambda message, *place, **line: f"warning: {printable(str(message))}\n"
    if logging.lastResort:
        logging.lastResort.setFormatter(Printable())
    command = getattr(import_module(f"unmask.cli.{MODULES.get(name, name)}"), name.title().replace("_", ""))
    return int(parse(command, arguments, f"unmask {name.replace('_', ' ')}").run())


def guarded(who: str, action: Callable[[], int], debug: bool = False) -> int:
    """The exit status of ``action``; its errors are one line of ``who`` each, with ``debug`` they are raised."""
    try:
        status = action()
        sys.stdout.flush()  # an error of it would come too late to be told
        return status
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        drop_output()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        if len(message) > LONGEST:  # a value may be a whole file
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        if not isinstance(error, (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"{who}: {printable(message)}", file=sys.stderr)
        drop_output()
        return 2


def drop_output() -> None:
    """Drop what standard output did not take: at the end Python would try again, and fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


class Printable(logging.Formatter):
    """Log messages without control characters, which may come from names of files."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def say(text: object) -> None:
    """Print ``text``, which may have the name of a file or a model's words in it."""
    print(printable(str(text)))

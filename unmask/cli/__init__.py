"""The ``unmask`` command. One file per subcommand: parse, call the library, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

DESCRIPTION = "Decode masked diffusion language models with trained or hand-made unmasking policies."
EPILOG = """first steps:
  unmask generate                      watch the packaged model fill its buffer
  unmask generate "cEaCfBeG:a="        complete a prompt of your own
  unmask train quickstart              train a policy in a few minutes
  unmask evaluate --problems 200       accuracy against forwards, policy by policy
  unmask info                          what was built and what this machine has"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; subcommand modules are light, heavy imports happen when one runs."""
    from unmask import __version__
    from unmask.cli import bench, evaluate, generate, info, plot, push, train

    parser = argparse.ArgumentParser(
        prog="unmask", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"unmask {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, train, evaluate, plot, push, bench, info):
        module.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends with a one-line message and exit status 2."""
    from unmask.cli.memory import keep_freed_memory

    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest:  # argparse does not take up a list of positionals again after an option
        if not (hasattr(args, "settings") and all("=" in item and not item.startswith("-") for item in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.settings += rest
    keep_freed_memory()
    try:
        return int(args.run(args) or 0)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        if args.debug:
            raise
        print(f"unmask {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130

"""Texts from files and from models, which may hold anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """``text`` with control characters escaped, but for line ends and tabs: a terminal would obey them."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def read_text(path: Path) -> str:
    """The text in ``path``. OSError if it cannot be read, ValueError if it is not UTF-8; both name it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    except OSError as error:
        raise error if error.filename else OSError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: str, place: object) -> Any:
    """The value that ``text`` is in JSON; ValueError names the ``place`` it is from."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from None

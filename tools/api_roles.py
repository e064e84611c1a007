"""An extension of griffe for the documentation site: docstrings name code by Sphinx roles, which Markdown lacks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")


class Roles(griffe.Extension):
    """Writes ``:class:`name``` as code, and an example's lead-in without its second colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value).replace("Example::\n", "Example:\n")

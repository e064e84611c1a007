"""The page that plays decodings step by step: one file of HTML without any request, for browsers and notebooks."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).parent / "trace.html"


def page(data: Mapping[str, Any]) -> str:
    """The whole page for ``data`` as :func:`unmask.sampling.trace.trace_data` makes it.

    Texts reach the page as JSON in which no tag can begin, and are shown as plain text.
    """
    written = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace(">DATA<", f">{written}<", 1)


def frame(page: str) -> str:
    """``page`` in a frame of its own, as a notebook shows it: its style and script touch nothing else there."""
    style = "width: 100%; height: 32rem; border: 0"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page)}"></iframe>'

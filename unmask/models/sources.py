"""From a name to a folder: packaged models, local folders, and repositories of the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from unmask.text import parse_json, read_text

CONFIG = "config.json"
CONFIG_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHT_FILES = ("*.safetensors",)
CODE_FILES = ("*.py",)

_PACKAGE = Path(__file__).parent


def packaged_models() -> dict[str, Path]:
    """Folders of the packaged models by name: every folder here with a config.json (``_`` reads as ``-``)."""
    folders = sorted(path.parent for path in _PACKAGE.glob("*/config.json"))
    return {folder.name.replace("_", "-"): folder for folder in folders}


def find_folder(name_or_path: str | Path, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder that holds a model: packaged, local, or downloaded from the hub.

    A packaged name wins over a folder of that name; write ``./tiny`` for the folder. ``patterns`` select the files
    of a hub repository, ``revision`` its branch, tag or commit. Raises FileNotFoundError, ConnectionError
    if the hub cannot deliver, ImportError without huggingface_hub, ValueError for a revision of something local.
    """
    name = str(name_or_path)
    packaged = packaged_models()
    local = packaged.get(name) if isinstance(name_or_path, str) else None
    if local is None and Path(name).expanduser().is_dir():
        local = Path(name).expanduser()
    if local is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} goes with a hub id, but {name!r} is a local folder")
        return local
    if not isinstance(name_or_path, str) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise FileNotFoundError(f"no folder {name}; packaged models: {', '.join(packaged) or 'none'}")
    return download(name, revision, patterns, tuple(packaged))


def download(name: str, revision: str | None, patterns: tuple[str, ...], packaged: tuple[str, ...] = ()) -> Path:
    """The local copy of a hub repository's top-level files, downloaded if it is not in the cache."""
    close = difflib.get_close_matches(name, packaged, n=1)
    known = f"{name!r} is neither a packaged model ({', '.join(packaged) or 'none'}) nor a local folder"
    known += f" (did you mean {close[0]}?)" if close else ""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ImportError(
            f"{known}; reading it from the hub needs huggingface_hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(
            f"{known}, and the hub did not deliver it: {reason} "
            "(offline? HF_HUB_OFFLINE set? private repositories need `hf auth login`)"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises FileNotFoundError, or ValueError if it is not one."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value

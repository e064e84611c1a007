"""What the caller of ``load_model`` changes of a checkpoint's configuration, and where its stop ids come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from unmask.config import Config, Count, PositiveInt
from unmask.models.config_values import BLOCK_KEYS, TokenIds, ids_of
from unmask.models.sources import CONFIG, read_json

GENERATION = "generation_config.json"
NAMED = ("sdar", "sdar_moe")
"""Model types whose names may end with the block size, such as SDAR-8B-Chat-b32."""


class Overrides(Config, kw_only=True):
    """What :func:`load_model` replaces of a checkpoint; None leaves it."""

    mask_token_id: Count | None = None
    eos_token_id: TokenIds = None
    block_length: PositiveInt | None = None
    logits_shift: Literal[0, 1] = 0
    causal_context: bool | None = None
    quantization: Literal["int8", "int8-dynamic", "int4"] | None = None

    def of(self, folder: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
        """``raw``, the config.json of ``folder``, as changed, with every stop id that it or generation_config.json has.

        The ids are under ``stop_ids``, and the first of them is ``eos_token_id``. A model at ``name`` of which only
        that tells the block size gets it from there.
        """
        changed = dict(raw)
        if self.eos_token_id is not None:
            stops = ids_of("eos_token_id", self.eos_token_id)
        else:
            path = folder / GENERATION
            said = (raw.get("eos_token_id"), raw.get("stop_ids"))
            stops = ids_of(f"{folder / CONFIG}: eos_token_id", *said)
            if path.is_file():
                stops += ids_of(f"{path}: eos_token_id", read_json(path).get("eos_token_id"))
        changed["eos_token_id"], changed["stop_ids"] = next(iter(stops), None), list(stops)
        if self.mask_token_id is not None:
            changed["mask_token_id"] = self.mask_token_id
        if self.causal_context is not None:
            changed["causal_context"] = self.causal_context
        if self.block_length is not None:
            changed = {key: value for key, value in changed.items() if key not in BLOCK_KEYS}
            changed["block_length"] = self.block_length
        silent = raw.get("model_type") in NAMED and not any(raw.get(key) for key in BLOCK_KEYS)
        if self.block_length is None and silent and (size := re.search(r"-b([1-9]\d*)$", name)):
            changed["block_length"] = int(size[1])
        return changed

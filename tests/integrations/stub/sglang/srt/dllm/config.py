"""Stand-in for ``sglang.srt.dllm.config``: the fields that algorithms read, for a LLaDA2 model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass
class DllmConfig:
    algorithm: str
    algorithm_config: dict[str, Any]
    block_size: int
    mask_id: int
    max_running_requests: int
    first_done_first_out_mode: bool = False

    @staticmethod
    def from_server_args(args: Any) -> DllmConfig | None:
        if args.dllm_algorithm is None:
            return None
        file = args.dllm_algorithm_config
        settings = {} if file is None else yaml.safe_load(Path(file).read_text()) or {}
        size = settings.get("block_size", 32)
        return DllmConfig(args.dllm_algorithm, settings, size, 156895, args.max_running_requests or 1, args.dllm_fdfo)

"""Stand-in for ``sglang.srt.dllm.config``: the fields that algorithms read, for a LLaDA2 model."""

from __future__ import annotations

from typing import Any

import yaml


class DllmConfig:
    def __init__(
        self,
        algorithm: str,
        algorithm_config: dict[str, Any],
        block_size: int,
        mask_id: int,
        max_running_requests: int,
        first_done_first_out_mode: bool = False,
    ) -> None:
        self.algorithm, self.algorithm_config = algorithm, algorithm_config
        self.block_size, self.mask_id = block_size, mask_id
        self.max_running_requests = max_running_requests
        self.first_done_first_out_mode = first_done_first_out_mode

    @staticmethod
    def from_server_args(server_args: Any) -> DllmConfig | None:
        if server_args.dllm_algorithm is None:
            return None
        settings: dict[str, Any] = {}
        if server_args.dllm_algorithm_config is not None:
            with open(server_args.dllm_algorithm_config) as file:
                settings = yaml.safe_load(file) or {}
            if not isinstance(settings, dict):
                raise ValueError("expected a mapping")
        return DllmConfig(
            algorithm=server_args.dllm_algorithm,
            algorithm_config=settings,
            block_size=settings.get("block_size", 32),
            mask_id=156895,
            max_running_requests=server_args.max_running_requests or 1,
            first_done_first_out_mode=server_args.dllm_fdfo,
        )

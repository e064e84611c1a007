"""The processes of a run, through accelerate: one, or several under ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Processes:
    """The device, averages over processes, and experiment trackers.

    Raises ImportError if accelerate or a requested tracker is not installed.
    """

    def __init__(self, report_to: Sequence[str] | None, output_dir: Path) -> None:
        """``report_to`` None: this process alone, without accelerate."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.index, self.count, self.is_main = 0, 1, True
        self._accelerator: Any = None
        self._tracks = bool(report_to)
        if report_to is None:
            return
        try:
            from accelerate import Accelerator, InitProcessGroupKwargs
        except ImportError as error:
            raise ImportError('training needs accelerate: pip install "unmask[train]"') from error
        for name in report_to:
            if find_spec(name) is None:
                raise ImportError(f"report_to names {name!r}, which is not installed: pip install {name}")
        patient = InitProcessGroupKwargs(timeout=timedelta(weeks=4))  # while the main process calibrates, others wait
        a = self._accelerator = Accelerator(
            log_with=list(report_to) or None, project_dir=str(output_dir), kwargs_handlers=[patient]
        )
        self.device, self.is_main = a.device, a.is_main_process
        self.index, self.count = a.process_index, a.num_processes

    def mean(self, values: Tensor) -> Tensor:
        """The average of a tensor over the processes, the same bits everywhere."""
        return values if self.count == 1 else self._accelerator.reduce(values, reduction="mean")

    def mean_of(self, values: dict[str, float]) -> dict[str, float]:
        """The average of each number; every process must pass the same names."""
        if self.count == 1:
            return values
        names = sorted(values)
        means = self.mean(torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device))
        return dict(zip(names, means.tolist(), strict=True))

    def maximum(self, value: float) -> float:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return value
        return float(self._accelerator.gather(torch.tensor([value], dtype=torch.float64, device=self.device)).max())

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def start_trackers(self, config: dict[str, Any]) -> None:
        if self._tracks:
            simple = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}
            self._accelerator.init_trackers("unmask", config=simple)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send ``values`` to the trackers, if there are any."""
        if self._tracks:
            self._accelerator.log(values, step=step)

    def finish(self) -> None:
        """Close the trackers and leave the group of processes, which may abort others if it is torn down at exit."""
        self.wait()
        if self._accelerator is not None:
            self._accelerator.end_training()

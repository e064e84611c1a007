"""What a generation returns."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask.plots.trace import frame, page
from unmask.sampling.trace import Origin, trace_data
from unmask.sampling.trajectory import Trajectory


@dataclass(repr=False)
class GenerationResult:
    """Completions of B prompts with a buffer of L tokens."""

    sequences: Tensor
    """(B, P + L) int64: left padding, prompt and completion."""
    completions: Tensor
    """(B, L) int64; after an early stop, and behind the tokens of a stop string, the rest is end of sequence
    (DiffusionGemma: padding). For ``infill``, the whole text (B, T)."""
    steps: Tensor
    """(B,) int64: denoising forwards, those with a mask in the row's active block (NFE)."""
    finished: Tensor
    """(B,) bool: no mask left; False where ``max_steps`` came first."""
    filled: Tensor
    """(B,) int64: generated tokens up to and including the first end of sequence or stop string; for ``infill``, masks
    filled."""
    forwards: Tensor | None = None
    """(B,) int64: all forwards after the prompt's: ``steps``, those that only revised, and those that gave a seed; with
    ``cfg_scale`` each of them twice."""
    texts: list[str] | None = None
    """Completions up to the first end of sequence or stop string, decoded; None without a tokenizer."""
    trajectory: Trajectory | None = None
    """Observations and actions of every step, if ``record`` was set."""
    origin: Origin | None = None
    """What made it, if ``record`` was set."""

    def __repr__(self) -> str:
        rows, length = self.completions.shape
        nfe, tpf = (values.float().mean() for values in (self.steps, self.tokens_per_forward))
        done, texts = int(self.finished.sum()), "" if self.texts is None else f", texts={self.texts!r}"
        return f"GenerationResult({rows} x {length} tokens, {done} finished, NFE {nfe:.2f}, TPF {tpf:.2f}{texts})"

    def _repr_html_(self) -> str | None:
        """What a notebook shows: the page of :meth:`show` for a recorded result, else the plain text."""
        return None if self.trajectory is None or not len(self.steps) else frame(self._page(None, ()))

    def show(self, row: int | None = None, *others: GenerationResult) -> None:
        """Play the decoding step by step, of ``row`` or of all: in a notebook, else in the web browser.

        ``others`` are results for the same prompts, such as those of other policies, and are shown side by side. All
        must be recorded (``record=True``), else ValueError.
        """
        whole = self._page(row, others)
        if "ipykernel" in sys.modules:
            from IPython.display import display

            display({"text/html": frame(whole), "text/plain": repr(self)}, raw=True)
            return
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".html", delete=False) as file:
            file.write(whole)
        print(f"the order of unmasking: {file.name}")
        webbrowser.open(Path(file.name).as_uri())

    def to_html(self, path: str | Path, row: int | None = None, *others: GenerationResult) -> None:
        """Write the page of :meth:`show` to the file ``path``. It needs nothing else, not even a network."""
        Path(path).write_text(self._page(row, others), encoding="utf-8")

    def _page(self, row: int | None, others: Sequence[GenerationResult]) -> str:
        return page(trace_data([self, *others], range(len(self.steps)) if row is None else [row]))

    @property
    def tokens_per_forward(self) -> Tensor:
        """(B,) float32 TPF by denoising forwards: ``filled / steps``."""
        return self.filled.to(torch.float32) / self.steps.clamp_min(1).to(torch.float32)

    @property
    def tokens_per_any_forward(self) -> Tensor:
        """(B,) float32 TPF by all forwards after the prompt's: ``filled / forwards``."""
        forwards = self.steps if self.forwards is None else self.forwards
        return self.filled.to(torch.float32) / forwards.clamp_min(1).to(torch.float32)


@dataclass(repr=False)
class StreamEvent:
    """The changes of one step, one entry per row that took it."""

    rows: list[int]
    """Rows that took the step, by their prompts' numbers."""
    steps: list[int]
    """Denoising forwards each of these rows has taken by now."""
    positions: list[list[int]]
    """Newly committed positions of the buffer, per row."""
    tokens: list[list[int]]
    """The tokens committed there."""
    revised: list[list[int]]
    """Positions whose committed tokens were revised, per row."""
    finished: list[bool]
    """Whether the row is done after this step."""
    completions: Tensor
    """(B, L) int64 on the CPU: all rows' buffers after the step, masks included."""

    def __repr__(self) -> str:
        rows = zip(self.rows, self.steps, self.positions, self.finished, strict=True)
        said = (f"row {row}, step {n}: {positions}" + ", finished" * done for row, n, positions, done in rows)
        return f"StreamEvent({'; '.join(said)})"


def first_stop(completions: Tensor, stop_ids: Sequence[int]) -> Tensor:
    """(B,) int64: index of each row's first id that is one of ``stop_ids``, L where there is none."""
    length = completions.shape[1]
    index = torch.arange(length, device=completions.device).expand_as(completions)
    stops = torch.zeros_like(completions, dtype=torch.bool)
    for stop in stop_ids:
        stops |= completions == stop
    return torch.where(stops, index, length).amin(dim=1) if length else index.sum(dim=1)

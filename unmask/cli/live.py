"""The live view of ``unmask generate``: each prompt's buffer, redrawn after every step."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from unmask.cli import printable
from unmask.sampling.result import StreamEvent, first_stop

MASK, END = "░", "·"
LEGEND = f"{MASK} masked   bold green: committed in this step   bold magenta: revised   {END} end of sequence"


class View:
    """What has been committed so far, as styled text."""

    def __init__(self, sampler: Any, prompts: list[str]) -> None:
        self.sampler, self.prompts = sampler, prompts
        self.steps = [0] * len(prompts)
        self.finished = [False] * len(prompts)
        self.completions: list[list[int]] = []
        self.fresh: list[set[int]] = [set() for _ in prompts]
        self.revised: list[set[int]] = [set() for _ in prompts]
        self.stops, self.mask = sampler.stop_ids, sampler.model.mask_token_id
        if sampler.on_canvases:  # padded behind the end
            self.stops = (*self.stops, sampler.padding_id)

    def update(self, event: StreamEvent) -> None:
        self.settle()
        for i, row in enumerate(event.rows):
            self.steps[row], self.finished[row] = event.steps[i], event.finished[i]
            self.fresh[row], self.revised[row] = set(event.positions[i]), set(event.revised[i])
        self.completions = event.completions.tolist()

    def settle(self) -> None:
        """Nothing is new any more."""
        self.fresh, self.revised = [set() for _ in self.prompts], [set() for _ in self.prompts]

    def style(self, row: int, position: int) -> str:
        if position in self.revised[row]:
            return "bold magenta"
        return "bold green" if position in self.fresh[row] else "cyan"

    def line(self, row: int) -> Text:
        """Prompt, buffer and count of one row; neighbouring tokens of one style are decoded together."""
        text = Text(no_wrap=False)
        text.append(printable(self.prompts[row]), style="bold")
        run: list[int] = []
        style = ""
        for position, token in enumerate(self.completions[row]):
            piece_style = self.style(row, position)
            if token == self.mask or token in self.stops or piece_style != style:
                self.flush(text, run, style)
                run = []
            if token == self.mask:
                text.append(MASK, style="bright_black")
            elif token in self.stops:
                text.append(END, style="bold green" if position in self.fresh[row] else "bright_black")
            else:
                style = piece_style
                run.append(token)
        self.flush(text, run, style)
        mark = "✓" if self.mask not in self.completions[row] else "✗" if self.finished[row] else " "
        text.append(f"  {mark} {self.steps[row]:>3} forwards", style="yellow")
        return text

    def flush(self, text: Text, run: list[int], style: str) -> None:
        if run:  # decoded behind a token, as tokenizers drop the space that a text begins with
            decode = self.sampler.tokenizer.decode
            text.append(printable(decode(run[:1] + run)[len(decode(run[:1])) :]), style=style)

    def render(self) -> Group:
        return Group(*(self.line(row) for row in range(len(self.completions))), Text(LEGEND, style="dim"))

    def summary(self) -> str:
        """Totals, by the library's counting rules."""
        import torch

        completions = torch.tensor(self.completions)
        written = (first_stop(completions, self.sampler.stop_ids) + 1).clamp_max(completions.shape[1])
        filled = torch.minimum(written, (completions != self.mask).sum(dim=1))
        tokens, forwards = int(filled.sum()), sum(self.steps)
        unfinished = sum(self.mask in row for row in self.completions)
        return (
            f"{tokens} tokens in {forwards} forwards: {tokens / max(1, forwards):.2f} tokens per forward, "
            "the end-of-sequence tail not counted" + (f"; {unfinished} unfinished" if unfinished else "")
        )


def watch(sampler: Any, prompts: list[str], delay: float) -> None:
    """Decode ``prompts`` in a live display, pausing ``delay`` seconds per step so that a person can follow."""
    console, view = Console(), View(sampler, prompts)
    with Live(console=console, auto_refresh=False) as live:
        for event in sampler.stream(prompts):
            view.update(event)
            live.update(view.render(), refresh=True)
            time.sleep(delay)
        view.settle()
        live.update(view.render(), refresh=True)
    console.print(view.summary(), style="dim")

"""The live view of ``unmask generate`` and ``unmask chat``: each prompt's buffer, redrawn after every step."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text

from unmask.sampling.result import StreamEvent
from unmask.text import printable

MASK, END = "░", "·"
LEGEND = f"{MASK} masked  {END} end of sequence  green: committed in this step  magenta: revised"
PIECES = re.compile(rf"\n|[^\S\n]+|[{MASK}{END}]|[^\s{MASK}{END}]+")
"""Between these a line may break."""
GUTTER = len("✓ 1234 forwards ")


class View:
    """What has been committed so far. Drawn on a console, it fits the screen unless ``whole`` is set."""

    def __init__(self, sampler: Any, prompts: Sequence[str]) -> None:
        """``prompts`` are what is shown of them; of an empty one nothing is."""
        self.sampler, self.prompts = sampler, prompts
        self.steps = [0] * len(prompts)
        self.finished = [False] * len(prompts)
        self.completions: list[list[int]] = []
        self.stops, self.mask = sampler.stop_ids, sampler.model.mask_token_id
        self.whole = False
        if sampler.on_canvases:  # padded behind the end
            self.stops = (*self.stops, sampler.padding_id)
        self.settle()

    def update(self, event: StreamEvent) -> None:
        self.settle()
        for i, row in enumerate(event.rows):
            self.steps[row], self.finished[row] = event.steps[i], event.finished[i]
            self.fresh[row], self.revised[row] = set(event.positions[i]), set(event.revised[i])
        self.completions = event.completions.tolist()

    def settle(self) -> None:
        """Nothing is new any more."""
        self.fresh: list[set[int]] = [set() for _ in self.prompts]
        self.revised: list[set[int]] = [set() for _ in self.prompts]

    def canvas(self, row: int) -> Text:
        """The buffer of one row; neighbouring tokens of one style are decoded together, and ends are counted."""

        def kind(item: tuple[int, int]) -> tuple[str, str]:
            position, token = item
            if token == self.mask:
                return MASK, "bright_black"
            fresh = "bold green" if position in self.fresh[row] else ""
            if token in self.stops:
                return END, fresh or "bright_black"
            return "", "bold magenta" if position in self.revised[row] else fresh or "cyan"

        text, decode = Text(), self.sampler.tokenizer.decode
        for (sign, style), items in groupby(enumerate(self.completions[row]), kind):
            run = [token for _, token in items]
            if sign == MASK:
                text.append(MASK * len(run), style)
            elif sign == END:
                text.append(END if len(run) == 1 else f"{END}x{len(run)} ", style)
            else:  # decoded behind a token, as tokenizers drop the space that a text begins with
                shown = decode(run[:1] + run)[len(decode(run[:1])) :]
                text.append(printable(shown).replace("\t", "    "), style)
        return text

    def lines(self, row: int, width: int) -> tuple[list[Text], list[Text]]:
        """The lines of a row's prompt and of its buffer, at most ``width`` cells wide."""
        prompt = printable(self.prompts[row]).strip("\n").replace("\t", "    ")
        return broken(Text(prompt, "bold"), width) if prompt else [], broken(self.canvas(row), width)

    def draw(self, row: int, parts: tuple[list[Text], list[Text]], room: int) -> Iterator[Text]:
        """``parts`` in at most ``room`` lines, with the row's count in front. A dotted margin is where some are cut."""
        prompt, buffer = parts
        asked = min(len(prompt), max(1, room // 3, room - len(buffer)))
        left = room - asked
        masked = next((i for i, line in enumerate(buffer) if MASK in line.plain), len(buffer))
        first = max(0, min(masked - left // 2, len(buffer) - left))
        shown = [*prompt[:asked], *buffer[first : first + left]]
        cut = {asked - 1} if asked < len(prompt) else set[int]()
        cut |= ({asked} if first else set()) | ({len(shown) - 1} if first + left < len(buffer) else set())
        mark = "✓" if self.mask not in self.completions[row] else "✗" if self.finished[row] else " "
        for i, line in enumerate(shown):
            count = f"{mark} {self.steps[row]:>4} forwards " if i == 0 else " " * GUTTER
            yield Text(count, "yellow").append("⋮ " if i in cut else "│ ", "bright_black").append(line)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        rows, room = range(len(self.completions)), max(4, console.height - 2)
        if not self.whole and 2 * len(rows) > room:
            rows = self.window(room // 2)
        parts = [self.lines(row, max(8, options.max_width - GUTTER - 2)) for row in rows]
        needs = [len(prompt) + len(buffer) for prompt, buffer in parts]
        rooms = needs if self.whole else shares(needs, room)
        for row, part, height in zip(rows, parts, rooms, strict=True):
            yield from self.draw(row, part, height)
        hidden = [done for row, done in enumerate(self.finished) if row not in rows]
        note = f"and {len(hidden)} more prompts, {sum(hidden)} of them finished" if hidden else LEGEND
        if not self.whole:
            yield Text(note, "dim", no_wrap=True, overflow="ellipsis")

    def window(self, count: int) -> range:
        """``count`` rows, of which the first is the first that is not finished, if enough follow."""
        unfinished = self.finished.index(False) if False in self.finished else 0
        first = max(0, min(unfinished, len(self.finished) - count))
        return range(first, first + count)

    def read(self, end_ids: Sequence[int]) -> Any:
        """Where the rows end, and their texts, as :meth:`unmask.Sampler.read` has them."""
        import torch

        sampler = self.sampler
        return sampler.read(torch.tensor(self.completions), end_ids, sampler.stop_strings(end_ids, sampler.config))

    def summary(self) -> str:
        """Totals, by the library's counting rules."""
        import torch

        completions = torch.tensor(self.completions)
        ends, _ = self.read(self.sampler.stop_ids)
        written = (ends + 1).clamp_max(completions.shape[1])
        filled = torch.minimum(written, (completions != self.mask).sum(dim=1))
        tokens, forwards = int(filled.sum()), sum(self.steps)
        unfinished = sum(self.mask in row for row in self.completions)
        return (
            f"{tokens} tokens in {forwards} forwards: {tokens / max(1, forwards):.2f} tokens per forward, "
            "the end-of-sequence tail not counted" + (f"; {unfinished} unfinished" if unfinished else "")
        )


def broken(text: Text, width: int) -> list[Text]:
    """Lines of at most ``width`` cells: broken at line ends, spaces and masks, and within words longer than a line."""
    breaks, column = list[int](), 0
    for piece in PIECES.finditer(text.plain):
        size = cell_len(piece[0])
        if piece[0] == "\n" or (piece[0].isspace() and column + size > width):
            breaks.append(piece.end())
            column = 0
        elif column + size <= width:
            column += size
        else:
            if column:
                breaks.append(piece.start())
            column = 0
            for i, character in enumerate(piece[0], piece.start()):
                if column + cell_len(character) > width:
                    breaks.append(i)
                    column = 0
                column += cell_len(character)
    lines = [*text.divide(breaks)]
    for line in lines:
        line.rstrip()
    return lines


def shares(needs: Sequence[int], room: int) -> list[int]:
    """How many of ``room`` lines each gets that needs so many: what the small ones leave goes to the large ones."""
    given, left = dict[int, int](), room
    for n, i in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        given[i] = min(needs[i], left // (len(needs) - n))
        left -= given[i]
    return [given[i] for i in range(len(needs))]


def watch(view: View, events: Any, console: Console, delay: float) -> None:
    """Draw ``view`` as ``events``, a stream of the sampler's, change it; ``delay`` seconds per step to follow it.

    What is drawn vanishes at the end, also after an exception.
    """
    try:
        with closing(events), Live(console=console, auto_refresh=False, transient=True) as live:
            for event in events:
                view.update(event)
                live.update(view, refresh=True)
                time.sleep(delay)
    finally:
        view.settle()
        view.whole = True

"""The live view, drawn to a string."""

from __future__ import annotations

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from unmask import Sampler, SamplerConfig
from unmask.cli.live import END, MASK, View, broken, shares

PROMPTS = ["cEaCfBeGgD:a=", "bCaBcDdEgF:a="]


def tiny(**settings: int) -> Sampler:
    return Sampler.from_pretrained("tiny", "confidence:24", config=SamplerConfig(24, **settings))


def drawn(view: View, width: int = 120, height: int = 25) -> list[str]:
    console = Console(width=width, height=height, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return capture.get().splitlines()


def test_view_shows_the_buffer_filling() -> None:
    sampler, frames = tiny(block_length=8), []
    view = View(sampler, PROMPTS)
    for event in sampler.stream(PROMPTS):
        view.update(event)
        frames.append(drawn(view))
    texts = sampler.generate(PROMPTS).texts
    assert texts is not None
    asked, buffer = frames[0][:2]
    assert asked == f"     1 forwards │ {PROMPTS[0]}", "the prompt has a line of its own"
    assert buffer.count(MASK) == 23
    view.settle()
    answer = f"{texts[0]}{END}x{24 - len(texts[0])}"
    assert drawn(view)[:2] == [f"✓ {view.steps[0]:>4} forwards │ {PROMPTS[0]}", f"{'':16}│ {answer}"]
    # One token per step, none for the tail after the first end of sequence.
    counted = sum(len(t) + 1 for t in texts)
    assert view.summary().startswith(f"{counted} tokens in {sum(view.steps)} forwards")
    assert torch.tensor(view.completions).shape == (2, 24)


def test_rows_that_ran_out_of_steps_are_no_successes() -> None:
    sampler = tiny(block_length=24, max_steps=2)
    view = View(sampler, PROMPTS)
    for event in sampler.stream(PROMPTS):
        view.update(event)
    assert drawn(view)[0].startswith("✗    2 forwards")
    filled = int(sampler.generate(PROMPTS).filled.sum())
    assert view.summary().startswith(f"{filled} tokens in 4 forwards")
    assert view.summary().endswith("; 2 unfinished")


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (44, 8)])
def test_it_fits_the_screen(rows: int, width: int, height: int) -> None:
    """Counters stay in their column, prompts and buffers in theirs, and the first mask is in sight."""
    sampler = tiny()
    view = View(sampler, [f"prompt {i} " + "and many words of it " * 20 for i in range(rows)])
    view.completions = [[5] * 400 + [sampler.model.mask_token_id] * 400 for _ in range(rows)]
    lines = drawn(view, width, height)
    assert len(lines) < height
    assert all(cell_len(line) <= width for line in lines)
    *body, last = lines
    assert {line[16] for line in body} <= {"│", "⋮"}
    counts = [line for line in body if "forwards" in line[:16]]
    shown = min(rows, (height - 2) // 2)
    assert len(counts) == shown
    assert sum(MASK in line for line in body) >= shown
    assert last.startswith("░ masked" if shown == rows else f"and {rows - shown} more prompts, 0 of them finished")
    view.whole = True
    whole = drawn(view, width, height)
    assert sum(line.count(MASK) for line in whole) == 400 * rows
    assert sum(line.count("words") for line in whole) == 20 * rows, "no word is broken"


def test_lines_break_between_words_and_masks() -> None:
    text = Text("one two-three\n  four" + MASK * 7 + " fivesixseven\u65e5\u672c", "bold")
    lines = broken(text, 8)
    assert [line.plain for line in lines] == [
        "one", "two-thre", "e", "  four░░", "░░░░░", "fivesixs", "even\u65e5\u672c",
    ]  # fmt: skip
    assert all(line.style == "bold" for line in lines)
    assert [line.plain for line in broken(Text("a b"), 8)] == ["a b"]
    assert [line.plain for line in broken(Text(""), 8)] == [""]


def test_room_is_shared_out() -> None:
    assert shares([1, 9, 9], 11) == [1, 5, 5]
    assert shares([3, 2], 10) == [3, 2]
    assert sum(shares([9, 9, 9], 20)) == 20

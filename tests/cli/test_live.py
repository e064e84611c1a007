"""The live view, drawn to a string."""

from __future__ import annotations

import torch
from rich.console import Console

from unmask import Sampler, SamplerConfig
from unmask.cli.live import END, MASK, View


def test_view_shows_the_buffer_filling() -> None:
    sampler = Sampler.from_pretrained(
        "tiny", policy="confidence:24", config=SamplerConfig(max_new_tokens=24, block_length=8)
    )
    prompts = ["cEaCfBeGgD:a=", "bCaBcDdEgF:a="]
    view = View(sampler, prompts)
    drawn = []
    for event in sampler.stream(prompts):
        view.update(event)
        console = Console(width=120, color_system=None, record=True)
        with console.capture() as capture:
            console.print(view.render())
        drawn.append(capture.get().splitlines())
    texts = sampler.generate(prompts).texts
    assert texts is not None
    first, last = drawn[0][0], drawn[-1][0]
    assert first.startswith(prompts[0])
    assert first.count(MASK) == 23
    assert MASK not in last
    assert prompts[0] + texts[0] + END in last
    assert "✓" in last
    # One token per step, none for the tail after the first end of sequence.
    counted = sum(len(t) + 1 for t in texts)
    assert view.summary().startswith(f"{counted} tokens in {sum(view.steps)} forwards")
    assert torch.tensor(view.completions).shape == (2, 24)


def test_rows_that_ran_out_of_steps_are_no_successes() -> None:
    config = SamplerConfig(max_new_tokens=24, block_length=24, max_steps=2)
    sampler = Sampler.from_pretrained("tiny", policy="confidence:24", config=config)
    prompts = ["cEaCfBeGgD:a=", "bCaBcDdEgF:a="]
    view = View(sampler, prompts)
    for event in sampler.stream(prompts):
        view.update(event)
    assert "✗" in view.line(0).plain
    assert "✓" not in view.line(0).plain
    filled = int(sampler.generate(prompts).filled.sum())
    assert view.summary().startswith(f"{filled} tokens in 4 forwards")
    assert view.summary().endswith("; 2 unfinished")

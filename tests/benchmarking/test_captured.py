"""Calls captured as one graph, and inputs taken in turn, without a GPU."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unmask.benchmarking import step
from unmask.benchmarking.captured import Captured, copies, in_turn, library
from unmask.benchmarking.timing import medians

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from recorded_graphs import RecordedGraphs

CPU = torch.device("cpu")


def test_a_graph_does_all_calls_and_returns_what_the_last_one_did() -> None:
    x, backend = torch.zeros(1), RecordedGraphs()
    captured = Captured(lambda: (None, x.add_(1) * 10), backend, calls=7)
    assert captured()[1].tolist() == [80.0]  # one to warm up
    assert captured()[1].tolist() == [150.0]
    assert (backend.eager, backend.captures, backend.replays) == (1, 1, 2)


def test_a_captured_call_counts_as_many_as_it_does() -> None:
    class Runs:
        """Captures nothing: what it is given runs when it is replayed."""

        def warm_up(self, run: Any) -> Any:
            return run()

        def capture(self, run: Any) -> Any:
            return SimpleNamespace(replay=run)

    pause: Any = partial(time.sleep, 1e-3)
    seconds = medians({"captured": Captured(pause, Runs(), calls=20), "plain": pause}, CPU, 0.05)  # type: ignore[arg-type]
    assert 1e-3 <= seconds["captured"] < 5e-3, "20 of them are 20e-3"
    assert 1e-3 <= seconds["plain"] < 5e-3


def test_inputs_come_in_turn_and_the_cpu_has_one() -> None:
    inputs = [torch.tensor(float(i)) for i in range(3)]
    call = in_turn(lambda x: x.item() + 1, inputs)
    assert [call() for _ in range(4)] == [1.0, 2.0, 3.0, 1.0]
    assert copies(inputs[0]) == [inputs[0]]
    assert library(call, CPU) == {"unmask": call}


@pytest.mark.parametrize("calls", [1, 3])
def test_captured_steps_have_a_fresh_canvas_each(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("VOCAB", 200), ("MASK", 150), ("EOS", 151)):
        monkeypatch.setattr(step, name, value)
    s = step.Setting(2, CPU)
    for kind in step.kinds(s):
        want = kind.ours(s.canvases, **kind.drawn).clone()
        captured = Captured(partial(kind.ours, step.Canvases(s.fresh, calls), **kind.drawn), RecordedGraphs(), calls)
        for _ in range(3):
            assert torch.equal(captured(), want)
    assert torch.equal(s.fresh.mask.sum(dim=1), torch.tensor([224, 224])), "the original is left alone"

"""The benchmark of captured steps, on a small model and without a GPU; and that of the LM head's rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask.benchmarking import graphs, lm_head
from unmask.benchmarking.rollouts import confident_policy
from unmask.policies import make_policy
from unmask.sampling import SamplerConfig
from unmask.sampling.graph import StepGraphs

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from recorded_graphs import RecordedGraphs

CPU = torch.device("cpu")


@pytest.mark.parametrize("policy", ["confidence:24", "learned"])
def test_ways_of_launching_agree(policy: str) -> None:
    shape = replace(graphs.llada_config(layers=1, hidden=128), vocab_size=3000, mask_token_id=2999, eos_token_id=2998)
    model = graphs.random_transformer(shape, CPU, torch.float32)
    config = SamplerConfig(max_new_tokens=64, block_length=32, actions="greedy", stop_at_eos=False, cuda_graphs=None)
    chosen = confident_policy(CPU) if policy == "learned" else make_policy(policy)
    backends = []

    def make(loops: bool) -> StepGraphs:
        backends.append(RecordedGraphs())
        return StepGraphs(backends[-1], loops=loops)

    decoding = graphs.Decoding(model, chosen, config, make)
    decoding.check()
    assert (backends[0].loops, backends[1].loops) == (0, 3)
    forwards = 0

    def capture(forward: Any) -> Any:
        nonlocal forwards
        assert forward().shape[-1] == model.vocab_size

        def replay() -> None:
            nonlocal forwards
            forwards += 1

        return replay

    decoding.bare(capture)()
    assert forwards == decoding.steps


def test_no_graphs_are_timed_on_the_cpu() -> None:
    assert graphs.comparisons(CPU) == []


def test_few_rows_of_the_lm_head_equal_those_of_all() -> None:
    found = lm_head.comparisons(CPU, quick=True)
    assert len(found) == 4
    for comparison in found:
        comparison.check()
        confidence, token = comparison.contenders["unmask"]()
        with pytest.raises(AssertionError, match="differ"):
            lm_head.same(lambda: (confidence.roll(1), token), comparison.contenders["eager"], 0.05)  # noqa: B023

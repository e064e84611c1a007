"""The benchmark of captured steps, on a small model and without a GPU; and that of the LM head's rows."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from unmask.sampling.graph import StepGraphs

from unmask.benchmarking import graphs, lm_head
from unmask.policies import make_policy
from unmask.sampling import SamplerConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from recorded_graphs import RecordedGraphs

CPU = torch.device("cpu")


@pytest.mark.parametrize("policy", ["confidence:24", "learned"])
def test_ways_of_launching_agree(policy: str) -> None:
    shape = replace(graphs.llada_config(layers=1, hidden=128), vocab_size=3000, mask_token_id=2999, eos_token_id=2998)
    model = graphs.random_transformer(shape, CPU, torch.float32)
    config = SamplerConfig(max_new_tokens=64, block_length=32, actions="greedy", stop_at_eos=False, cuda_graphs=None)
    chosen = graphs.telling_policy(model, config) if policy == "learned" else make_policy(policy)
    backends = []

    def make(loops: bool) -> StepGraphs:
        backends.append(RecordedGraphs())
        return StepGraphs(backends[-1], loops=loops)

    decoding = graphs.Decoding(model, chosen, config, make)
    assert 8 < decoding.steps < 64, "several positions in a step, several steps in a block"
    decoding.check()
    assert (backends[0].loops, backends[1].loops) == (0, 3)
    backend = RecordedGraphs()
    decoding.bare(backend)()
    assert (backend.captures, backend.replays) == (1, decoding.steps)


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

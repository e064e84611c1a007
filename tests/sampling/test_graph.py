"""Captured steps give what plain steps give: the whole machinery, with recorded operations in place of CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_helpers import POLICIES, PROMPTS, assert_equal, eager, graphed, make
from helpers import EOS, MASK
from recorded_graphs import RecordedGraphs

from unmask.sampling.graph import batch_bucket, width_bucket


@pytest.mark.parametrize(
    "overrides",
    [{}, {"temperature": 0.7, "seed": 5, "block_length": None}, {"max_batch_size": 5, "stop_at_eos": True}],
    ids=["all rows", "drawn tokens", "refilled"],
)
@pytest.mark.parametrize(
    ("policy", "loops"),
    [
        *((policy, True) for policy in POLICIES),
        *((policy, False) for policy in ("random:8", "klass:0.5,0.1", "learned")),
    ],
)
def test_captured_steps_equal_plain_ones(policy: str, overrides: dict[str, Any], loops: bool) -> None:
    sampler, backend = make(policy, loops)
    want = eager(sampler, **overrides)
    assert backend.captures == backend.eager == 0
    for _ in range(3):
        assert_equal(graphed(sampler, **overrides), want)
    before = backend.captures, backend.eager
    assert_equal(graphed(sampler, **overrides), want)
    assert (backend.captures, backend.eager) == before, "every shape has come up three times: nothing is left to do"
    assert backend.captures >= 1
    assert (backend.loops if loops else backend.replays) >= 1


def test_a_generation_is_one_launch_of_the_loop() -> None:
    sampler, backend = make("confidence:16")
    want = eager(sampler, [[1, 2, 3]])
    graphed(sampler, [[1, 2, 3]])
    backend.loops = backend.looped = backend.replays = backend.eager = 0
    assert_equal(graphed(sampler, [[3, 2, 1]]), eager(sampler, [[3, 2, 1]]))
    assert (backend.loops, backend.looped, backend.replays, backend.eager) == (1, 16, 0, 0)
    assert want.steps.tolist() == [16]


def test_one_prompt_without_padding_keeps_its_width() -> None:
    sampler, _ = make()
    graphed(sampler, [[1, 2, 3]])
    graphed(sampler, [[1, 2, 3], [4]])
    assert sampler.graphs is not None
    shapes = [(shape.rows, shape.width, shape.start, shape.attention) for _, shape in sampler.graphs.steps]
    assert shapes[0] == (1, 19, 3, False)
    assert shapes[1] == (2, 32, 16, True)


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (9, 9), (16, 16), (17, 18), (31, 32), (32, 32), (33, 36), (64, 64), (65, 72)]
)
def test_batches_are_padded_to_few_sizes(rows: int, bucket: int) -> None:
    assert batch_bucket(rows) == bucket


def test_padding_is_less_than_an_eighth_and_settled() -> None:
    for rows in range(1, 2000):
        bucket = batch_bucket(rows)
        assert rows <= bucket < rows * 1.125
        assert batch_bucket(bucket) == bucket
    assert len({batch_bucket(rows) for rows in range(1, 257)}) == 48


def test_widths_are_padded_within_the_context() -> None:
    assert [width_bucket(w, None) for w in (1, 16, 17)] == [16, 16, 32]
    assert [width_bucket(w, 40) for w in (20, 33, 40)] == [32, 40, 40]


@pytest.mark.parametrize("policy", ["confidence:8", "learned"])
def test_recording(policy: str) -> None:
    sampler, backend = make(policy, record=True, max_batch_size=4, seed=3)
    got, want = graphed(sampler), eager(sampler)
    assert_equal(got, want)
    assert backend.replays > 0
    for name, value in vars(want.trajectory).items():
        torch.testing.assert_close(vars(got.trajectory)[name], value, rtol=0, atol=1e-4, msg=name)


def test_streaming() -> None:
    sampler, backend = make("confidence:8", max_batch_size=4)
    for got, want in zip(sampler.stream(PROMPTS), sampler.stream(PROMPTS, cuda_graphs=False), strict=True):
        assert {**vars(got), "completions": 0} == {**vars(want), "completions": 0}
        assert torch.equal(got.completions, want.completions)
    assert backend.replays > 0


def test_groups_share_their_first_step() -> None:
    sampler, backend = make("learned", max_batch_size=10)
    prompts = [p for p in PROMPTS for _ in range(5)]
    results = []
    for graphs in (False, True):
        config = sampler.config.updated({"cuda_graphs": graphs})
        canvas = sampler.prepare(prompts, None, config)
        results.append(sampler.finish(canvas, config, EOS, group_size=5))
    assert_equal(*results)
    assert backend.replays + backend.looped > 0


def test_infilling_and_empty_batches() -> None:
    sampler, backend = make("threshold:0.3")
    ids = torch.randint(0, EOS, (17, 18))
    ids = ids.masked_fill(torch.rand(17, 18) < 0.4, MASK)
    attention = torch.ones_like(ids)
    attention[2, :4] = 0
    for mask in (None, attention):
        for _ in range(2):
            got = sampler.infill(ids, mask, cuda_graphs=True)
            assert_equal(got, sampler.infill(ids, mask, cuda_graphs=False))
    assert backend.captures >= 2
    assert graphed(sampler, []).completions.shape == (0, 16)
    assert_equal(graphed(sampler, [[]]), eager(sampler, [[]]))


def test_the_stand_in_bakes_numbers_in_and_computes_nothing_while_recording() -> None:
    x, factor = torch.ones(3), [2.0]

    def run() -> Any:
        x.mul_(factor[0])
        return x, x + 1.0

    captured = RecordedGraphs().capture(run)
    assert x.tolist() == [1.0] * 3
    factor[0] = 5.0
    _, first = captured.replay()
    assert x.tolist() == [2.0] * 3
    assert first.tolist() == [3.0] * 3
    assert captured.replay()[1] is first
    assert first.tolist() == [5.0] * 3
    with pytest.raises(RuntimeError, match="waits"):
        RecordedGraphs().capture(lambda: x.sum().item())

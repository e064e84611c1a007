"""What only a GPU can show: graphs, no host synchronisation, several streams at once, many blocks at work."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from calm_cases import random_problem
from policy_cases import inputs, pack, random_network, worst_error
from set_cases import Problem, compare
from torch import Tensor
from unmask_cases import assert_same, moved, random_state

from unmask.ops import State, calm_, policy_forward, topk_confidence, unmask_

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH, VOCAB = 64, 5003


def random_logits(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)


def buffers(batch: int, seed: int = 0) -> State:
    return random_state(torch.Generator().manual_seed(seed), batch, 8, LENGTH, 16, 0.8)


class Step:
    """One denoising step on static tensors: all three ops, as a sampler would capture them."""

    def __init__(self, batch: int, mode: str) -> None:
        self.batch, self.mode = batch, mode
        self.state = moved(buffers(batch), "cuda")
        self.logits = torch.zeros(batch, LENGTH, VOCAB, device="cuda")
        self.weights = pack(random_network(64, 2, 128, 1, seed=3), "cuda")
        self.seed = torch.tensor([11], device="cuda")
        self.index = torch.arange(LENGTH, device="cuda")

    def __call__(self) -> Tensor:
        s = self.state
        key = (s.sequence[:, None], s.position[:, None] + self.index, (s.forwards + s.draw_step)[:, None])
        counter = torch.stack(torch.broadcast_tensors(*key), dim=-1)
        result = topk_confidence(
            self.logits, rows=s.mask, temperature=0.8, seed=self.seed, counter=counter, exclude=(3,)
        )
        logits = policy_forward(self.weights, s.mask, result.confidence, s.steps / LENGTH, rows=s.allowed)
        return unmask_(s, result.sample, logits, max_steps=200, mode=self.mode, eos=(12, 13), seed=self.seed)

    def new_logits(self, step: int) -> None:
        self.logits.copy_(random_logits(self.batch * LENGTH, seed=step).view_as(self.logits))


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call and the tensor that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # loads modules outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("mode", ["bernoulli-argmax", "dpls"])
def test_a_captured_step_replays(mode: str) -> None:
    replayed, eager = Step(3, mode), Step(3, mode)
    start = moved(replayed.state, "cuda")
    graph, rank = captured(replayed)
    replayed.state.put(torch.arange(3, device="cuda"), start)
    for step in range(12):
        replayed.new_logits(step)
        eager.new_logits(step)
        graph.replay()
        assert torch.equal(rank, eager())
        assert_same(replayed.state, eager.state)
    assert not torch.equal(replayed.state.tokens, start.tokens)


def test_seed_in_a_graph_can_change() -> None:
    logits, seed = random_logits(64).cuda(), torch.tensor([1], device="cuda")
    graph, sample = captured(lambda: topk_confidence(logits, temperature=1.0, seed=seed).sample)
    for value in (1, 2, -7):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(sample, topk_confidence(logits, temperature=1.0, seed=value).sample)


def test_a_captured_selection_replays() -> None:
    problem, other = (Problem.random((64, 2, 256), 2, 5, 64, 40, seed=seed).to("cuda") for seed in (2, 4))
    graph, score = captured(lambda: problem.run()[1])
    for name, value in problem.proposals._asdict().items():
        if value is not None:
            value.copy_(getattr(other.proposals, name))
    want = problem.run()[1]
    graph.replay()
    assert torch.equal(score, want)


def calls() -> dict[str, Callable[[], Any]]:
    logits = random_logits(256, torch.bfloat16).cuda()
    select, rows = torch.rand(256, device="cuda") < 0.3, torch.arange(0, 256, 3, device="cuda")
    narrow, wide = (pack(random_network(128, 2, 512, k), "cuda") for k in (1, 50))
    mask, confidence, time = (t.cuda() for t in inputs(4, 64, 1))
    many = inputs(4, 64, 50)[1].cuda()
    problem = random_problem(random.Random(0), torch.Generator().manual_seed(0), VOCAB)
    drifting = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in problem.items()}
    small, long = (Problem.random((64, 2, 256), 2, 5, length, 5).to("cuda") for length in (24, 300))
    return {
        "topk": lambda: topk_confidence(logits, 1),
        "topk 8": lambda: topk_confidence(logits, 8, rows=select, logsumexp=True, entropy=True, exclude=(1, 2)),
        "topk sampled": lambda: topk_confidence(logits, 2, rows=rows, temperature=0.5, seed=3),
        "policy": lambda: (policy_forward(narrow, mask, confidence, time, rows=mask),),
        "policy 50": lambda: (policy_forward(wide, mask, many, time),),
        "set": small.run,
        "set of a long buffer": long.run,
        "calm": lambda: calm_(**{**drifting, **{n: drifting[n].clone() for n in ("previous", "calm_for")}}),
    }


def test_no_host_synchronisation() -> None:
    for call in (*calls().values(), Step(2, "dpls")):
        call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")  # what makes the host wait for the device raises
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_results_do_not_vary() -> None:
    """A race between blocks or threads shows as results that differ between runs, or between streams."""
    for name, call in calls().items():
        first = call()
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        for turn in range(50):
            with torch.cuda.stream(streams[turn % 4]):
                again = call()
            torch.cuda.synchronize()
            for a, b in zip(first, again, strict=True):
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def test_streams_do_not_disturb_each_other() -> None:
    logits = [random_logits(16, seed=i, vocab=60000).cuda() for i in range(4)]
    expected = [topk_confidence(x, 4).token for x in logits]
    streams = [torch.cuda.Stream() for _ in logits]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for x, stream in zip(logits, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(topk_confidence(x, 4).token)
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 32, 300])
def test_real_vocabulary_against_float64(dtype: torch.dtype, rows: int) -> None:
    """The number of rows decides how many blocks share one."""
    logits = random_logits(rows, dtype, seed=rows, vocab=126464).cuda()
    result = topk_confidence(logits, 8, logsumexp=True, entropy=True)
    p = logits.double().softmax(dim=-1)
    assert torch.equal(result.token[:, 0], p.argmax(dim=-1))
    torch.testing.assert_close(result.confidence.double(), p.topk(8).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.confidence.double(), p.gather(1, result.token), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.logsumexp.double(), logits.double().logsumexp(dim=-1), rtol=0, atol=2e-5)
    torch.testing.assert_close(result.entropy.double(), -(p * p.log()).sum(dim=-1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("batch", [1, 5, 16, 40, 200])
@pytest.mark.parametrize("k", [1, 8, 50])
def test_policy_of_any_batch(batch: int, k: int) -> None:
    """The batch decides how many blocks share a sequence."""
    assert worst_error((128, 2, 512), k, 100, batch, "cuda") < 1e-4


@pytest.mark.parametrize("batch", [1, 8, 64, 500])
@pytest.mark.parametrize("length", [24, 64, 128])
def test_sets_of_any_batch(batch: int, length: int) -> None:
    """The batch decides how many blocks share a row, and how many rows they take in turn."""
    error, clear, total = compare(Problem.random((64, 2, 256), 2, 5, length, batch, seed=batch), "cuda")
    assert error < 1e-5
    assert clear > 0.9 * total > 0

"""What only a GPU can show: graphs, no host synchronisation, draws equal to the CPU's, several streams at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from policy_cases import inputs, pack, random_network
from torch import Tensor
from unmask_cases import MODES, STATE, assert_same, make_state, random_canvas

from unmask.ops import policy_forward, topk_confidence, unmask_

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH, BLOCK, VOCAB = 64, 16, 5003


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def random_logits(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)


def random_state(batch: int, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return make_state(random_canvas(generator, batch, LENGTH + 8, 8, LENGTH, 0.8), 8, LENGTH, BLOCK)


class Step:
    """One denoising step on static tensors: all three ops, as a sampler would capture them."""

    def __init__(self, batch: int, device: str, mode: str) -> None:
        self.batch, self.mode = batch, mode
        self.state = {name: value.to(device, copy=True) for name, value in random_state(batch).items()}
        self.logits = torch.zeros(batch, LENGTH, VOCAB, device=device)
        self.weights = pack(random_network(64, 2, 128, 1, seed=3), device)
        self.seed = torch.tensor([11], device=device)
        self.sequence = torch.arange(batch, device=device) + 5
        self.position = torch.arange(LENGTH, device=device).expand(batch, LENGTH)

    def __call__(self) -> Tensor:
        s = self.state
        counter = torch.stack(
            (
                self.sequence[:, None].expand(-1, LENGTH),
                self.position,
                s["steps"][:, None].expand(-1, LENGTH),
            ),
            dim=-1,
        ).contiguous()
        result = topk_confidence(
            self.logits, rows=s["mask"], temperature=0.8, seed=self.seed, counter=counter, exclude=(3,)
        )
        time = s["steps"].float() / LENGTH
        score = policy_forward(self.weights, s["mask"], result.confidence, time, rows=s["allowed"])
        return unmask_(
            s["tokens"],
            result.sample,
            score,
            **{name: s[name] for name in STATE},
            start=8,
            block_length=BLOCK,
            max_steps=200,
            mode=self.mode,
            seed=self.seed,
            sequence=self.sequence,
        )

    def new_logits(self, step: int) -> None:
        self.logits.copy_(random_logits(self.batch * LENGTH, seed=step).view_as(self.logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_equal_the_cpu(dtype: torch.dtype, temperature: float) -> None:
    logits = random_logits(96, dtype, vocab=32003)
    counter = torch.randint(0, 2**31, (96, 3), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"k": 4, "temperature": temperature, "seed": 2**60 + 17, "exclude": (7, 31999)}
    there = topk_confidence(logits.cuda(), counter=counter.cuda(), **settings)
    here = topk_confidence(logits, counter=counter, **settings)
    assert torch.equal(there.sample.cpu(), here.sample)
    assert torch.equal(there.token.cpu(), here.token)
    torch.testing.assert_close(there.confidence.cpu(), here.confidence, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.sample_confidence.cpu(), here.sample_confidence, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_actions_equal_the_cpu(mode: str) -> None:
    batch = 33
    generator = torch.Generator().manual_seed(5)
    token = torch.randint(10, 90, (batch, LENGTH), generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        state = {name: value.to(device) for name, value in random_state(batch, seed=2).items()}
        scores = torch.Generator().manual_seed(6)
        for _ in range(6):
            score = torch.randn(batch, LENGTH, generator=scores) - (0.0 if mode == "select" else 1.0)
            rank = unmask_(
                state["tokens"],
                token.to(device),
                score.to(device),
                **{name: state[name] for name in STATE},
                start=8,
                block_length=BLOCK,
                max_steps=5,
                mode=mode,
                eos=12,
                seed=99,
            )
        results.append({**{name: value.cpu() for name, value in state.items()}, "rank": rank.cpu()})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("mode", ["bernoulli-argmax", "dpls"])
def test_a_captured_step_replays(mode: str) -> None:
    captured, eager = Step(3, "cuda", mode), Step(3, "cuda", mode)
    start = {name: value.clone() for name, value in captured.state.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured()  # loads modules outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rank = captured()
    for name, value in start.items():
        captured.state[name].copy_(value)
    for step in range(12):
        captured.new_logits(step)
        eager.new_logits(step)
        graph.replay()
        expected = eager()
        assert torch.equal(rank, expected)
        for name in ("tokens", *STATE):
            assert torch.equal(captured.state[name], eager.state[name]), name
    assert not torch.equal(captured.state["tokens"], start["tokens"])


def test_seed_in_a_graph_can_change() -> None:
    logits, seed = random_logits(64).cuda(), torch.tensor([1], device="cuda")
    topk_confidence(logits, temperature=1.0, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample = topk_confidence(logits, temperature=1.0, seed=seed).sample
    for value in (1, 2, -7):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(sample, topk_confidence(logits, temperature=1.0, seed=value).sample)


def calls() -> dict[str, Callable[[], Any]]:
    logits = random_logits(256, torch.bfloat16).cuda()
    select = torch.rand(256, device="cuda") < 0.3
    rows = torch.arange(0, 256, 3, device="cuda")
    weights = pack(random_network(128, 2, 512, 1), "cuda")
    wide = pack(random_network(128, 2, 512, 50), "cuda")
    mask, confidence, time = (t.cuda() for t in inputs(4, 64, 1))
    _, many, _ = (t.cuda() for t in inputs(4, 64, 50))
    return {
        "topk": lambda: topk_confidence(logits, 1),
        "topk 8": lambda: topk_confidence(logits, 8, rows=select, logsumexp=True, entropy=True, exclude=(1, 2)),
        "topk sampled": lambda: topk_confidence(logits, 2, rows=rows, temperature=0.5, seed=3),
        "policy": lambda: policy_forward(weights, mask, confidence, time, rows=mask),
        "policy 50": lambda: policy_forward(wide, mask, many, time),
        "step": Step(2, "cuda", "dpls"),
    }


def test_no_host_synchronisation() -> None:
    for call in calls().values():
        call()
        with no_synchronisation():
            call()


def test_results_do_not_vary() -> None:
    """A race between blocks or threads shows as results that differ between runs."""
    for name, call in calls().items():
        if name == "step":
            continue
        first = call()
        for _ in range(50):
            again = call()
            pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
            for a, b in pairs:
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
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 32, 300])
def test_real_vocabulary_against_float64(dtype: torch.dtype, rows: int) -> None:
    logits = random_logits(rows, dtype, seed=rows, vocab=126464).cuda()
    result = topk_confidence(logits, 8, logsumexp=True, entropy=True)
    exact = logits.double()
    p = exact.softmax(dim=-1)
    assert torch.equal(result.token[:, 0], exact.argmax(dim=-1))
    torch.testing.assert_close(result.confidence.double(), p.topk(8).values, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.confidence.double(), p.gather(1, result.token), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.logsumexp.double(), exact.logsumexp(dim=-1), rtol=0, atol=2e-5)
    torch.testing.assert_close(result.entropy.double(), -(p * p.log()).sum(dim=-1), rtol=0, atol=5e-5)


@pytest.mark.parametrize("batch", [1, 5, 16, 40, 200])
@pytest.mark.parametrize("k", [1, 8, 50])
def test_policy_of_any_batch_equals_the_cpu(batch: int, k: int) -> None:
    """The batch decides how many blocks share a sequence."""
    weights = pack(random_network(128, 2, 512, k, seed=k))
    mask, confidence, time = inputs(batch, 100, k, seed=batch)
    here = policy_forward(weights, mask, confidence, time, rows=mask)
    there = policy_forward(
        weights._replace(packed=weights.packed.cuda()), mask.cuda(), confidence.cuda(), time.cuda(), rows=mask.cuda()
    )
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)

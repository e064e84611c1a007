"""CUDA graphs of a step and loops on the device, against plain steps: what only a GPU can show."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from graph_helpers import POLICIES, PROMPTS, Waiting, assert_equal, eager, graphed, learned
from helpers import random_model

from unmask import Policy, Sampler, SamplerConfig
from unmask.models.base import ModelBase
from unmask.ops.library import graph_loop_unsupported, new_graph_loop
from unmask.sampling.capture import CudaGraphs, CudaStep, DeviceLoop
from unmask.sampling.graph import StepGraphs

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
needs_loops = pytest.mark.skipif(bool(graph_loop_unsupported()), reason=graph_loop_unsupported())


def make(policy: Any = "threshold:0.5", loops: bool = True, **config: Any) -> Sampler:
    if isinstance(policy, str) and policy.startswith("learned"):
        policy = learned(context="block" if "block" in policy else "full")
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False, "cuda_graphs": None} | config
    sampler = Sampler(random_model().cuda(), policy=policy, config=SamplerConfig(**settings))
    sampler.graphs = StepGraphs(CudaGraphs(torch.device(sampler.model.device)), loops=loops)
    return sampler


def captured(sampler: Sampler) -> list[CudaStep]:
    assert sampler.graphs is not None
    return [step.captured for step in sampler.graphs.steps.values() if step.captured is not None]  # type: ignore[misc]


@pytest.fixture(autouse=True)
def _no_fallback() -> Any:
    """A graph that could not be made is a failure, unless the test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"temperature": 0.7, "seed": 5, "block_length": None}, {"max_batch_size": 5, "stop_at_eos": True}],
    ids=["all rows", "drawn tokens", "refilled"],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_graphs_equal_plain_steps(policy: str, overrides: dict[str, Any], loops: bool) -> None:
    sampler = make(policy, loops)
    want = eager(sampler, **overrides)
    for _ in range(4):
        assert_equal(graphed(sampler, **overrides), want)
    assert captured(sampler)
    if loops and not graph_loop_unsupported():
        assert any(step._loop is not None for step in captured(sampler))


@needs_loops
def test_a_generation_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = make("confidence:16")
    prompts = [[1, 2, 3]]
    graphed(sampler, prompts)
    launches = []
    launch = DeviceLoop.launch
    monkeypatch.setattr(DeviceLoop, "launch", lambda self: launches.append(launch(self)))
    monkeypatch.setattr(CudaStep, "replay", lambda self: pytest.fail("a replay"))
    got = graphed(sampler, prompts)
    assert_equal(got, eager(sampler, prompts))
    assert got.steps.tolist() == [16]
    assert len(launches) == 1


@needs_loops
@pytest.mark.parametrize(("limit", "runs"), [(0, 9), (1, 7), (2, 4), (3, 1), (99, 1)])
def test_a_loop_runs_until_few_enough_are_left(limit: int, runs: int) -> None:
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    ends = torch.tensor([7, 4, 9], device="cuda")
    done = torch.zeros(3, dtype=torch.bool, device="cuda")
    most = torch.tensor([limit], device="cuda")

    def run() -> Any:
        count.add_(1)
        done.copy_(count >= ends)
        return None, done

    backend = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    backend.warm_up(run)
    step = backend.capture(run)
    for _ in range(2):
        count.zero_()
        done.zero_()
        assert step.loop(done, most)
        assert int(count) == runs


@needs_loops
def test_a_loop_counts_many_rows() -> None:
    done = torch.zeros(1000, dtype=torch.bool, device="cuda")
    count, most = (torch.zeros(1, dtype=torch.int64, device="cuda") for _ in range(2))
    index = torch.arange(1000, device="cuda")

    def run() -> Any:
        count.add_(1)
        done.copy_(index < count * 100)
        return None, done

    backend = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    backend.warm_up(run)
    step = backend.capture(run)
    for limit, runs in ((0, 10), (1, 10), (99, 10), (100, 9), (950, 1)):
        count.zero_()
        most.fill_(limit)
        assert step.loop(done, most)
        assert int(count) == runs


def test_a_loop_needs_a_graph_it_can_hold() -> None:
    done, limit = torch.zeros(2, dtype=torch.bool, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="expected a graph"):
        new_graph_loop(0, done, limit)
    with pytest.raises(TypeError, match="expected done as bool"):
        new_graph_loop(8, limit, limit)
    with pytest.raises(ValueError, match="on one CUDA device"):
        new_graph_loop(8, done.cpu(), limit)


def test_training_the_policy_is_followed() -> None:
    policy = learned()
    sampler = make(policy, seed=1)
    prompts = [[1, 2, 3]]
    first = graphed(sampler, prompts)
    with torch.no_grad():
        policy.output_proj.bias.add_(4.0)
    want = eager(sampler, prompts)
    assert_equal(graphed(sampler, prompts), want)
    assert int(want.steps) < int(first.steps)
    assert len(captured(sampler)) == 1


def test_graphs_of_different_shapes_do_not_disturb_each_other() -> None:
    """They share their memory; each is replayed after the others were captured."""
    sampler = make("learned", temperature=0.8)
    sets = [PROMPTS[:n] for n in (1, 3, 17, 2)]
    want = [eager(sampler, prompts) for prompts in sets]
    for _ in range(4):
        for prompts, expected in zip(sets, want, strict=True):
            assert_equal(graphed(sampler, prompts), expected)
    assert len(captured(sampler)) >= 4


def test_recording_and_streaming() -> None:
    sampler = make("learned", max_batch_size=4)
    got, want = graphed(sampler, record=True), eager(sampler, record=True)
    assert_equal(got, want)
    assert captured(sampler)
    for name, value in vars(want.trajectory).items():
        torch.testing.assert_close(vars(got.trajectory)[name], value, rtol=0, atol=1e-4, msg=name)
    for a, b in zip(sampler.stream(PROMPTS), sampler.stream(PROMPTS, cuda_graphs=False), strict=True):
        assert a.rows == b.rows
        assert a.positions == b.positions
        assert a.tokens == b.tokens


def test_a_model_that_waits_runs_as_before() -> None:
    sampler = make(Waiting(0.5))
    want = eager(sampler)
    with pytest.warns(RuntimeWarning, match="could not be captured"):
        assert_equal(graphed(sampler), want)
    assert_equal(graphed(sampler), want)
    assert not captured(sampler)


def test_a_capture_that_breaks_leaves_the_device_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the rehearsal had not seen what the capture does not survive."""
    stream = torch.cuda.current_stream()
    sampler = make(Waiting(0.5))
    want = eager(sampler)
    with monkeypatch.context() as patch:
        patch.setattr(CudaGraphs, "rehearse", lambda self, run: (self.warm_up(run), ""))
        with pytest.warns(RuntimeWarning, match="could not be captured"):
            assert_equal(graphed(sampler), want)
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    assert 0 <= float(torch.rand(1, device="cuda")) < 1, "the generator is not left in its capture"
    other = make("confidence:8")
    assert_equal(graphed(other), eager(other))
    assert captured(other)


@pytest.mark.parametrize("kind", ["broken by CUDA", "an exception of Python's"])
def test_a_backend_goes_on_capturing_after_a_failure(kind: str) -> None:
    backend = CudaGraphs(torch.device("cuda"))
    x = torch.zeros(4, device="cuda")

    def work() -> Any:
        return None, x.add_(1) * 2

    def fail() -> Any:
        work()
        if kind == "broken by CUDA":
            x.sum().item()
        raise KeyError("stop")

    backend.warm_up(work)
    first = backend.capture(work)
    with pytest.raises((RuntimeError, KeyError)):
        backend.capture(fail)
    second = backend.capture(work)
    x.zero_()
    for step, value in ((first, 2.0), (second, 4.0), (first, 6.0)):
        assert step.replay()[1].tolist() == [value] * 4
    assert torch.rand(3, device="cuda").shape == (3,)


def test_a_backend_captures_again_when_all_its_graphs_are_gone() -> None:
    """Even while what one of them computed is still in use, which keeps its pool of memory."""
    backend = CudaGraphs(torch.device("cuda"))
    x = torch.ones(1000, device="cuda")

    def work() -> Any:
        return None, x * 2

    backend.warm_up(work)
    kept = backend.capture(work).replay()[1]
    gc.collect()
    for _ in range(2):
        assert backend.capture(work).replay()[1].sum() == 2000
    assert kept.sum() == 2000


def test_memory_is_given_back() -> None:
    sampler = make("learned")
    graphed(sampler, PROMPTS[:1])
    assert sampler.graphs is not None
    sampler.graphs.max_graphs = 1
    torch.cuda.synchronize()
    held = []
    for n in range(2, 12):
        graphed(sampler, [[1] * n])
        held.append(torch.cuda.memory_allocated())
    assert len(captured(sampler)) == 1
    assert held[-1] <= held[2] * 1.05


def test_models_of_transformers() -> None:
    """Whether or not their code can be captured, results are those of plain steps."""
    transformers = pytest.importorskip("transformers")
    from unmask.models.masked_lm import MaskedLM

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model: ModelBase = MaskedLM(transformers.BertForMaskedLM(config).cuda().eval(), 49, 48, 0)
    sampler = Sampler(model, policy="confidence:8", config=SamplerConfig(max_new_tokens=16, block_length=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for prompts in ([[1, 2]], [[1, 2], [3]]):
            want = sampler.generate(prompts, cuda_graphs=False)
            for _ in range(2):
                got = sampler.generate(prompts, cuda_graphs=None)
                assert torch.equal(got.sequences, want.sequences)


def test_packaged_model() -> None:
    """Where they are possible graphs are used on CUDA, and the packaged model answers as on the CPU."""
    from unmask import load_model, load_tokenizer

    prompt = "cEaCfBeG:a="
    here = Sampler(load_model("tiny"), load_tokenizer("tiny")).generate(prompt).texts
    sampler = Sampler(load_model("tiny", device="cuda"), load_tokenizer("tiny"))
    assert isinstance(sampler.policy, Policy) or sampler.policy.graph_safe
    for _ in range(2):
        assert sampler.generate(prompt, cuda_graphs=None).texts == here
    assert sampler.graphs is not None

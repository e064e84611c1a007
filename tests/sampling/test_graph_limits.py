"""Where steps cannot be captured, how many captured ones are kept, and who may use them."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from graph_helpers import PROMPTS, Waiting, assert_equal, eager, graphed, make
from helpers import MASK, VOCAB, ScriptedModel, random_model
from recorded_graphs import RecordedGraphs

from unmask import Sampler, SamplerConfig
from unmask.policies import Threshold
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.sampling.batch import EagerBatch, GraphedBatch
from unmask.sampling.capture import synchronisations
from unmask.sampling.graph import StepGraphs


class Replacing(UnmaskingPolicy):
    """Counts its steps in new tensors; by its declaration it should write in place."""

    graph_safe = True

    def decide(self, observation: Observation) -> Decision:
        o = observation
        count = o.memory.get("count", torch.zeros_like(o.steps))
        o.memory["count"] = count + 1
        position = torch.arange(o.length)
        first = torch.where(o.allowed, position, o.length).amin(dim=1, keepdim=True)
        return Decision(select=o.allowed & (position < first + o.memory["count"][:, None]))


class HostCounting(Replacing):
    """The same on the host."""

    def decide(self, observation: Observation) -> Decision:
        o = observation
        o.memory["count"] = o.memory.get("count", 0) + 1
        return Decision(select=o.allowed & (torch.arange(o.length) % 3 < o.memory["count"] % 4))


@pytest.mark.parametrize("policy", [Waiting(0.5), Replacing(), HostCounting()], ids=["waits", "replaces", "host"])
def test_what_cannot_be_captured_runs_as_before_with_one_warning(policy: UnmaskingPolicy) -> None:
    sampler, backend = make(policy)
    want = eager(sampler, PROMPTS[:3])
    with pytest.warns(RuntimeWarning, match="could not be captured") as caught:
        got = graphed(sampler, PROMPTS[:3])
    assert len(caught) == 1
    assert_equal(got, want)
    captures = backend.captures
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in (PROMPTS[:3], PROMPTS):  # another shape, too, is not tried
            assert_equal(graphed(sampler, prompts), eager(sampler, prompts))
    assert backend.captures == captures <= 1
    assert backend.replays == backend.loops == 0
    assert sampler.graphs is not None
    assert not sampler.graphs.steps


def test_a_capture_out_of_memory_runs_as_before() -> None:
    sampler, backend = make("confidence:8")

    def capture(run: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    backend.capture = capture  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="out of memory"):
        got = graphed(sampler)
    assert_equal(got, eager(sampler))


def test_only_the_latest_graphs_are_kept() -> None:
    sampler, backend = make()
    graphs = sampler.graphs = StepGraphs(backend, max_graphs=2)
    prompts = [[[1]], [[1, 2]], [[1, 2, 3]]]
    for p in prompts:
        assert_equal(graphed(sampler, p), eager(sampler, p))
    assert [shape.start for _, shape in graphs.steps] == [2, 3]
    captures = backend.captures
    graphed(sampler, prompts[1])
    assert [shape.start for _, shape in graphs.steps] == [3, 2]
    assert backend.captures == captures
    graphed(sampler, prompts[0])
    assert [shape.start for _, shape in graphs.steps] == [2, 1]
    assert backend.captures == captures + 1


def test_graphs_are_kept_within_their_memory() -> None:
    sampler, backend = make()
    graphs = sampler.graphs = StepGraphs(backend, max_bytes=2_500_000)  # each takes a little over 10**6
    for n in range(1, 5):
        graphed(sampler, [[1] * n])
    assert 2 * 10**6 < graphs.reserved < 2.1 * 10**6
    assert [shape.start for _, shape in graphs.steps] == [3, 4]


def test_generations_at_once_do_not_share_a_canvas() -> None:
    sampler, backend = make("confidence:8")
    want = [[e.completions.tolist() for e in sampler.stream([p], cuda_graphs=False)] for p in ([1, 2], [3, 4])]
    streams = [sampler.stream([p]) for p in ([1, 2], [3, 4])]
    got: list[list[Any]] = [[], []]
    for pair in zip(*streams, strict=True):
        for i, event in enumerate(pair):
            got[i].append(event.completions.tolist())
    assert got == want
    assert backend.captures == 1


def test_an_abandoned_generation_frees_the_graphs() -> None:
    sampler, _ = make("confidence:8")
    events = sampler.stream([[1, 2]])
    next(events)
    config = sampler.config
    assert sampler.graphs is not None
    assert not sampler.graphs.acquire()
    events.close()  # type: ignore[attr-defined]
    canvas = sampler.prepare([[1]], None, config)
    run = sampler.run(canvas, config, lambda *_: (_ for _ in ()).throw(KeyError("a callback failed")))
    with pytest.raises(KeyError):
        next(run)
    assert sampler.graphs.acquire()


def test_where_graphs_are_not_possible() -> None:
    class Own(Threshold):
        graph_safe = False

    model = random_model()
    sampler = Sampler(model, policy="threshold:0.5", config=SamplerConfig(max_new_tokens=8, block_length=4))
    with pytest.raises(ValueError, match="cuda_graphs=True is not possible, as the model is on cpu"):
        sampler.generate([[1]], cuda_graphs=True)
    assert sampler.generate([[1]]).finished.all()
    sampler.graphs = StepGraphs(RecordedGraphs())
    for overrides, message in (
        ({"cache": "dual"}, 'cache="dual" changes'),
        ({"deterministic": True}, "deterministic=True"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.generate([[1]], cuda_graphs=True, **overrides)
        assert sampler.generate([[1]], **overrides).finished.all()
    sampler.policy = Own(0.5)
    with pytest.raises(ValueError, match="Own does not say that it can be captured"):
        sampler.infill(torch.tensor([[MASK]]), cuda_graphs=True)


def test_which_batch_is_used() -> None:
    sampler, _ = make()
    from unmask.sampling.step import DenoisingStep

    def batch(**overrides: Any) -> Any:
        config = sampler.config.updated(overrides)
        made = sampler.make_batch(DenoisingStep(sampler.model, sampler.policy, config, None))
        made.close()
        return made

    assert isinstance(batch(), GraphedBatch)
    assert isinstance(batch(cuda_graphs=False), EagerBatch)
    assert isinstance(batch(cache="prefix"), EagerBatch)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(batch(), EagerBatch)
    sampler.model = ScriptedModel(torch.zeros(16, VOCAB))  # nothing says that it computes the same every time
    assert isinstance(batch(), EagerBatch)
    assert isinstance(batch(cuda_graphs=True), GraphedBatch)
    sampler.model = random_model()
    assert isinstance(batch(), GraphedBatch)
    handle = sampler.model.layers[0].register_forward_hook(lambda *_: None)
    assert isinstance(batch(), EagerBatch)
    handle.remove()
    assert isinstance(batch(), GraphedBatch)
    sampler.model.layers[0].to("meta")
    assert isinstance(batch(), EagerBatch)
    sampler.model = random_model()
    assert isinstance(batch(), GraphedBatch)
    sampler.graphs = None
    assert isinstance(batch(), EagerBatch)


def test_only_this_threads_waiting_counts() -> None:
    def warn() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with warnings.catch_warnings(record=True) as others:
        warnings.simplefilter("error")
        with synchronisations() as seen:
            other = threading.Thread(target=warn)
            other.start()
            other.join()
            assert seen == []
            warn()
            warn()
            warnings.simplefilter("always")
            warnings.warn("something else", stacklevel=1)
        assert len(seen) == 2
        assert [str(w.message) for w in others] == ["something else"]


def test_undefined_logits_are_an_error_and_leave_the_graphs_free() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 3] = float("nan")
    sampler = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=4, block_length=4, cuda_graphs=True))
    sampler.graphs = StepGraphs(RecordedGraphs())
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1\]"):
        sampler.generate([[1], [2]])
    assert sampler.graphs.acquire()

"""Captured steps give what plain steps give: the whole machinery, with recorded operations in place of CUDA graphs."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model
from recorded_graphs import RecordedGraphs
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.ops.random import philox_uniform
from unmask.policies import Threshold
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.sampling.batch import EagerBatch, GraphedBatch
from unmask.sampling.capture import synchronisations
from unmask.sampling.graph import StepGraphs, batch_bucket, width_bucket

POLICIES = [
    "threshold:0.5",
    "confidence:8",
    "random:8",
    "margin:8",
    "entropy:8",
    "factor:1",
    "entropy-bound:0.5",
    "entropy-threshold:0.5",
    "klass:0.5,0.1",
    "learned",
    "learned block",
]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], *([i, i + 1] for i in range(14))]  # 17 rows, padded to 18


def learned(**config: Any) -> Policy:
    torch.manual_seed(3)
    return Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0, **config))


def make(policy: Any = "threshold:0.5", loops: bool = True, **config: Any) -> tuple[Sampler, RecordedGraphs]:
    """A sampler that captures, and what it captures with."""
    if isinstance(policy, str) and policy.startswith("learned"):
        policy = learned(context="block" if "block" in policy else "full")
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False} | config
    sampler = Sampler(random_model(), policy=policy, config=SamplerConfig(**{"cuda_graphs": None, **settings}))
    backend = RecordedGraphs(loops)
    sampler.graphs = StepGraphs(backend)
    return sampler, backend


def eager(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=False, **overrides)


def graphed(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=True, **overrides)


def assert_equal(got: Any, want: Any) -> None:
    for name in ("sequences", "completions", "steps", "finished", "filled"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


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


def test_the_seed_is_not_baked_in() -> None:
    sampler, backend = make("random:8", temperature=1.0)
    results = []
    for seed in (1, 2, 2**62 + 12345, None):
        got = graphed(sampler, seed=seed)
        assert_equal(got, eager(sampler, seed=seed))
        results.append(tuple(got.completions.flatten().tolist()))
    assert len(set(results)) == 4
    assert sampler.graphs is not None
    assert backend.captures == len(sampler.graphs.steps) == 1


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_uniform_takes_its_seed_from_a_tensor(seed: int) -> None:
    where = torch.arange(50)[None], torch.arange(3)[:, None], torch.arange(3)[:, None] + 7
    assert torch.equal(philox_uniform(torch.tensor([seed]), *where), philox_uniform(seed, *where))


def test_settings_that_are_baked_in_have_graphs_of_their_own() -> None:
    sampler, _ = make("learned")
    for overrides in ({}, {"policy_scale": 0.3}, {"policy_temperature": 3.0}, {"actions": "dpls"}, {"max_steps": 5}):
        assert_equal(graphed(sampler, **overrides), eager(sampler, **overrides))
    assert sampler.graphs is not None
    assert len({owner for owner, _ in sampler.graphs.steps}) == 5
    assert_equal(graphed(sampler, stop_at_eos=True), eager(sampler, stop_at_eos=True))
    assert len({owner for owner, _ in sampler.graphs.steps}) == 6


@pytest.mark.parametrize("hidden", [64, 24])  # the fused op, and the module where the op cannot take the size
def test_training_the_policy_is_followed(hidden: int) -> None:
    policy = Policy(PolicyConfig(hidden_size=hidden, ffn_size=64, output_bias=0.0))
    sampler, backend = make(policy, seed=1)
    prompts = [[1, 2, 3]]  # one row: a batch that never changes its shape
    first = graphed(sampler, prompts)
    captures = backend.captures
    with torch.no_grad():
        policy.output_proj.bias.add_(4.0)
    want = eager(sampler, prompts)
    assert_equal(graphed(sampler, prompts), want)
    assert int(want.steps.sum()) < int(first.steps.sum())
    assert backend.captures == captures == 1
    policy.output_proj.bias = torch.nn.Parameter(policy.output_proj.bias.detach() - 9.0)  # elsewhere in memory
    last = graphed(sampler, prompts)
    assert_equal(last, eager(sampler, prompts))
    assert int(last.steps.sum()) > int(want.steps.sum())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_between_two_steps_is_followed(elsewhere: bool) -> None:
    events = {}
    for graphs in (False, True):
        policy = learned()
        sampler, backend = make(policy, seed=1)
        steps = sampler.stream([[1, 2, 3]], cuda_graphs=graphs)
        events[graphs] = [next(steps).completions.tolist() for _ in range(4)]
        bias = policy.output_proj.bias
        if elsewhere:
            policy.output_proj.bias = torch.nn.Parameter(bias.detach() + 9.0)
        else:
            with torch.no_grad():
                bias.add_(9.0)
        events[graphs] += [event.completions.tolist() for event in steps]
    assert events[True] == events[False]
    assert len(events[True]) <= 8, "from then on a block takes one step"
    assert backend.captures == 1


class Counting(UnmaskingPolicy):
    """Unmasks one position more in every step of a row, which it counts in place from zero."""

    graph_safe = True

    def decide(self, observation: Observation) -> Decision:
        o = observation
        count = o.memory.setdefault("count", torch.zeros_like(o.steps)).add_(1)
        position = torch.arange(o.length)
        first = torch.where(o.allowed, position, o.length).amin(dim=1, keepdim=True)
        return Decision(select=o.allowed & (position < first + count[:, None]))


def test_memory_starts_at_zero_and_stays_with_its_row() -> None:
    sampler, backend = make(Counting(), max_batch_size=4, stop_at_eos=True)
    want = eager(sampler)
    assert len(set(want.steps.tolist())) > 1, "rows that end at different times"
    for _ in range(3):
        assert_equal(graphed(sampler), want)
    assert backend.loops > 0


def test_a_model_whose_weights_moved_is_captured_again() -> None:
    sampler, backend = make()
    graphed(sampler)
    captures = backend.captures
    with torch.no_grad():
        sampler.model.lm_head.weight.mul_(-1.0)  # in place: the graphs read it
    assert_equal(graphed(sampler), eager(sampler))
    sampler.model.lm_head.weight = torch.nn.Parameter(sampler.model.lm_head.weight.detach() * -1.0)
    assert_equal(graphed(sampler), eager(sampler))
    assert backend.captures > captures
    assert sampler.graphs is not None
    assert len({owner for owner, _ in sampler.graphs.steps}) == 1, "graphs of the old weights are gone"


def test_alpha_is_an_input() -> None:
    policy = learned(alpha_conditioned=True)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(std=0.3)
    sampler, backend = make(policy)
    for alpha in (0.1, 3.0):
        assert_equal(graphed(sampler, [[1, 2]], alpha=alpha), eager(sampler, [[1, 2]], alpha=alpha))
    assert backend.captures == 1


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


def test_undefined_logits_are_an_error_and_leave_the_graphs_free() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 3] = float("nan")
    sampler = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=4, block_length=4, cuda_graphs=True))
    sampler.graphs = StepGraphs(RecordedGraphs())
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1\]"):
        sampler.generate([[1], [2]])
    assert sampler.graphs.acquire()


class Waiting(Threshold):
    """Looks at a number on the host."""

    def score(self, observation: Observation) -> Tensor:
        return observation.token_confidence * float(observation.length + 0 * observation.steps.sum().item())


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
    with pytest.raises(ValueError, match="cuda_graphs must be True, False or None, got 1"):
        SamplerConfig(cuda_graphs=1)  # type: ignore[arg-type]


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

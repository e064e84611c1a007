"""Captured steps give what plain steps give. On a GPU with CUDA graphs, elsewhere with recorded operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model
from recorded_graphs import RecordedCapture
from torch import Tensor

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig
from unmask.policies import SetPolicy, SetPolicyConfig, Threshold
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.policies.options import split_options, with_options
from unmask.sampling.graphs import CudaCapture, StepGraphs, batch_bucket

RULES = ["threshold:0.5", "confidence:8", "random:8", "margin:8", "entropy:8", "factor:1", "entropy-bound:0.5"]
OPTIONS = ["threshold:0.5,window=3,spacing=2,hold-eos", "threshold:0.3,decay=0.1,edit=0.2,post=2", "learned,hold-eos"]
POLICIES = [*RULES, "entropy-threshold:0.5", "klass:0.5,0.1", "learned", "learned block", *OPTIONS]
POLICIES += ["set", "set,hold-eos,window=5,decay=0.1,lean=0.5", "dawn:0.8,0.5,0.3,0.1,0.5,hold-eos", "dapd:0.1,0.3"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], *([i, i + 1] for i in range(14))]  # 17 rows, padded to 18


class Counted:
    """A capture that counts."""

    def __init__(self, capture: Callable[[Any], Any]) -> None:
        self.capture, self.captures, self.replays = capture, 0, 0

    def __call__(self, run: Any) -> Any:
        self.captures += 1
        replay, output = self.capture(run)

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, output


def learned(**config: Any) -> Policy:
    torch.manual_seed(3)
    return Policy(PolicyConfig(hidden_size=64, ffn_size=128, output_bias=0.0, **config))


def selecting() -> SetPolicy:
    torch.manual_seed(3)
    policy = SetPolicy(SetPolicyConfig(vocab_size=VOCAB, hidden_size=32, ffn_size=32, sure=0.9, default_risk=0.3))
    torch.nn.init.normal_(policy.output.weight, std=0.2)
    torch.nn.init.constant_(policy.output.bias, -1.0)
    return policy.eval()


def make(device: torch.device, policy: Any = "threshold:0.5", **config: Any) -> tuple[Sampler, Counted]:
    """A sampler that captures, and what it captures with."""
    if isinstance(policy, str) and policy.startswith("learned"):
        policy = with_options(learned(context="block" if "block" in policy else "full"), split_options(policy)[1])
    if isinstance(policy, str) and policy.startswith("set"):
        policy = with_options(selecting(), split_options(policy)[1])
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False, "cuda_graphs": None, "seed": 0} | config
    model = random_model().to(device)
    sampler = Sampler(model, policy=policy, config=SamplerConfig(**settings))
    counted = Counted(CudaCapture(model.device) if device.type == "cuda" else RecordedCapture())
    sampler.graphs = StepGraphs(counted)
    return sampler, counted


def eager(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=False, **overrides)


def graphed(sampler: Sampler, prompts: Any = PROMPTS, **overrides: Any) -> Any:
    return sampler.generate(prompts, cuda_graphs=True, **overrides)


def assert_equal(got: Any, want: Any) -> None:
    for name in ("sequences", "completions", "steps", "finished", "filled"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.fixture(autouse=True)
def _no_fallback() -> Any:
    """A graph that could not be made is a failure, unless the test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize(
    "overrides",
    [{}, {"temperature": 0.7, "seed": 5, "block_length": None}, {"max_batch_size": 5, "stop_at_eos": True}],
    ids=["all rows", "drawn tokens", "refilled"],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_captured_steps_equal_plain_ones(policy: str, overrides: dict[str, Any], device: torch.device) -> None:
    sampler, counted = make(device, policy)
    want = eager(sampler, **overrides)
    assert counted.captures == 0
    for _ in range(3):
        assert_equal(graphed(sampler, **overrides), want)
    captures = counted.captures
    assert_equal(graphed(sampler, **overrides), want)
    assert counted.captures == captures >= 1, "every shape has come up three times: nothing is left to capture"
    assert counted.replays >= 1


def test_batches_are_padded_to_few_sizes_by_less_than_an_eighth() -> None:
    assert [batch_bucket(rows) for rows in (1, 9, 16, 17, 31, 33, 65)] == [1, 9, 16, 18, 32, 36, 72]
    for rows in range(1, 2000):
        bucket = batch_bucket(rows)
        assert rows <= bucket < rows * 1.125
        assert batch_bucket(bucket) == bucket


def test_widths_are_padded_only_if_rows_are(device: torch.device) -> None:
    sampler, _ = make(device)
    graphed(sampler, [[1, 2, 3]])
    graphed(sampler, [[1, 2, 3], [4]])
    assert sampler.graphs is not None
    shapes = [(tuple(s.state.tokens.shape), s.state.start) for s in sampler.graphs.steps.values()]
    assert ((1, 19), 3) in shapes
    assert ((2, 32), 16) in shapes


@pytest.mark.parametrize("policy", ["confidence:8", "learned"])
def test_recording_streaming_and_rollouts(policy: str, device: torch.device) -> None:
    sampler, counted = make(device, policy, record=True, max_batch_size=4, seed=3)
    got, want = graphed(sampler), eager(sampler)
    assert_equal(got, want)
    for name, value in vars(want.trajectory).items():
        torch.testing.assert_close(vars(got.trajectory)[name], value, rtol=0, atol=1e-4, msg=name)
    for got, want in zip(sampler.stream(PROMPTS), sampler.stream(PROMPTS, cuda_graphs=False), strict=True):
        assert {**vars(got), "completions": 0} == {**vars(want), "completions": 0}
        assert torch.equal(got.completions, want.completions)
    rollouts = []
    for graphs in (False, True):
        config = sampler.settled({"cuda_graphs": graphs})
        state = sampler.prepare([p for p in PROMPTS for _ in range(3)], None, config)
        rollouts.append(sampler.result(state, config, sampler.steps(state, config, share=not graphs)))
    assert_equal(*rollouts)
    assert counted.replays > 0


def test_infilling_and_empty_batches(device: torch.device) -> None:
    sampler, counted = make(device, "threshold:0.3")
    ids = torch.randint(0, EOS, (17, 18))
    ids = ids.masked_fill(torch.rand(17, 18) < 0.4, MASK)
    attention = torch.ones_like(ids)
    attention[2, :4] = 0
    for mask in (None, attention):
        for _ in range(2):
            got = sampler.infill(ids, mask, cuda_graphs=True)
            assert_equal(got, sampler.infill(ids, mask, cuda_graphs=False))
    assert counted.captures >= 2
    assert graphed(sampler, []).completions.shape == (0, 16)
    assert_equal(graphed(sampler, [[]]), eager(sampler, [[]]))


def test_what_is_read_from_memory_and_what_is_baked_in(device: torch.device) -> None:
    sampler, counted = make(device, "random:8", temperature=1.0)
    seeds = [1, 2, 2**62 + 12345]
    results = [graphed(sampler, seed=seed) for seed in seeds]
    for seed, got in zip(seeds, results, strict=True):
        assert_equal(got, eager(sampler, seed=seed))
    assert len({tuple(r.completions.flatten().tolist()) for r in results}) == 3
    assert counted.captures == 1
    sampler, counted = make(device, "learned")
    for overrides in ({}, {"policy_scale": 0.3}, {"policy_temperature": 3.0}, {"actions": "dpls"}, {"max_steps": 5}):
        assert_equal(graphed(sampler, **overrides), eager(sampler, **overrides))
    assert sampler.graphs is not None
    assert len({key.values[1] for key in sampler.graphs.steps}) == 5
    policy = learned(alpha_conditioned=True)
    with torch.no_grad():
        for p in policy.parameters():
            p.normal_(std=0.3)
    sampler, counted = make(device, policy)
    for alpha in (0.1, 3.0):
        assert_equal(graphed(sampler, [[1, 2]], alpha=alpha), eager(sampler, [[1, 2]], alpha=alpha))
    assert counted.captures == 1


@pytest.mark.parametrize("hidden", [64, 24, None])  # the op, the module where the op cannot take it, sets
def test_a_policy_that_changes_is_followed(hidden: int | None, device: torch.device) -> None:
    policy = selecting() if hidden is None else Policy(PolicyConfig(hidden_size=hidden, ffn_size=64, output_bias=0.0))
    output = policy.output_proj if isinstance(policy, Policy) else policy.output
    sampler, counted = make(device, policy, seed=1)
    prompts = [[1, 2, 3]]  # one row: a batch that never changes its shape
    first = graphed(sampler, prompts)
    with torch.no_grad():
        output.bias.add_(4.0)
    want = eager(sampler, prompts)
    assert_equal(graphed(sampler, prompts), want)
    assert int(want.steps.sum()) < int(first.steps.sum())
    assert counted.captures == 1
    output.bias = torch.nn.Parameter(output.bias.detach() - 9.0)  # elsewhere in memory
    last = graphed(sampler, prompts)
    assert_equal(last, eager(sampler, prompts))
    assert int(last.steps.sum()) > int(want.steps.sum())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_change_between_two_steps_is_followed(elsewhere: bool, device: torch.device) -> None:
    events = {}
    for graphs in (False, True):
        policy = learned()
        sampler, _ = make(device, policy, seed=1)
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


def test_a_model_whose_weights_moved_is_captured_again(device: torch.device) -> None:
    sampler, counted = make(device)
    graphed(sampler)
    captures = counted.captures
    with torch.no_grad():
        sampler.model.lm_head.weight.mul_(-1.0)  # in place: the graphs read it
    assert_equal(graphed(sampler), eager(sampler))
    sampler.model.lm_head.weight = torch.nn.Parameter(sampler.model.lm_head.weight.detach() * -1.0)
    assert_equal(graphed(sampler), eager(sampler))
    assert counted.captures > captures


class Growing(UnmaskingPolicy):
    """Unmasks one position more in every step of a row, which it counts in place from zero."""

    graph_safe = True

    def decide(self, observation: Observation) -> Decision:
        o = observation
        count = self.count(o)
        position = torch.arange(o.length, device=count.device)
        first = torch.where(o.allowed, position, o.length).amin(dim=1, keepdim=True)
        return Decision(select=o.allowed & (position < first + count[:, None]))

    def count(self, o: Observation) -> Tensor:
        return o.memory.setdefault("count", torch.zeros_like(o.steps)).add_(1)


class Replacing(Growing):
    """Counts in new tensors; by its declaration it should write in place."""

    def count(self, o: Observation) -> Tensor:
        o.memory["count"] = o.memory.get("count", torch.zeros_like(o.steps)) + 1
        return o.memory["count"]


class Waiting(Threshold):
    """Looks at a number on the host."""

    def picked(self, o: Observation) -> Tensor:
        return o.token_confidence > float(0 * o.steps.sum().item())


def test_memory_starts_at_zero_and_stays_with_its_row(device: torch.device) -> None:
    sampler, counted = make(device, Growing(), max_batch_size=4, stop_at_eos=True)
    want = eager(sampler)
    assert len(set(want.steps.tolist())) > 1, "rows that end at different times"
    for _ in range(3):
        assert_equal(graphed(sampler), want)
    assert counted.replays > 0


@pytest.mark.parametrize("policy", [Waiting(0.5), Replacing()], ids=["waits", "replaces"])
def test_what_cannot_be_captured_runs_as_before_with_one_warning(policy: UnmaskingPolicy, device: torch.device) -> None:
    sampler, counted = make(device, policy)
    want = eager(sampler, PROMPTS[:1])
    with pytest.warns(RuntimeWarning, match="could not be captured") as caught:
        got = graphed(sampler, PROMPTS[:1])
    assert len(caught) == 1
    assert_equal(got, want)
    assert_equal(graphed(sampler, PROMPTS[:1]), want)
    assert counted.captures == 1
    assert counted.replays == 0


def test_only_the_latest_graphs_are_kept(device: torch.device) -> None:
    sampler, counted = make(device)
    graphs = sampler.graphs = StepGraphs(counted, max_graphs=2)
    for prompt in ([1], [1, 2], [1, 2, 3]):
        assert_equal(graphed(sampler, [prompt]), eager(sampler, [prompt]))
    assert [step.state.start for step in graphs.steps.values()] == [2, 3]
    captures = counted.captures
    graphed(sampler, [[1, 2]])
    assert [step.state.start for step in graphs.steps.values()] == [3, 2]
    assert counted.captures == captures


def test_generations_at_once_do_not_share_memory_and_an_abandoned_one_frees_it(device: torch.device) -> None:
    sampler, counted = make(device, "confidence:8")
    want = [[e.completions.tolist() for e in sampler.stream([p], cuda_graphs=False)] for p in ([1, 2], [3, 4])]
    streams = [sampler.stream([p]) for p in ([1, 2], [3, 4])]
    got: list[list[Any]] = [[], []]
    for pair in zip(*streams, strict=True):
        for i, event in enumerate(pair):
            got[i].append(event.completions.tolist())
    assert got == want
    assert counted.captures == 1
    events = sampler.stream([[1, 2]])
    next(events)
    assert sampler.graphs is not None
    assert sampler.graphs.lock.locked()
    events.close()  # type: ignore[attr-defined]
    assert not sampler.graphs.lock.locked()


def test_where_graphs_are_not_possible() -> None:
    class Own(Threshold):
        graph_safe = False

    sampler = Sampler(random_model(), policy="threshold:0.5", config=SamplerConfig(max_new_tokens=8, block_length=4))
    with pytest.raises(ValueError, match="cuda_graphs=True is not possible, as the model is on cpu"):
        sampler.generate([[1]], cuda_graphs=True)
    sampler.graphs = StepGraphs(RecordedCapture())
    for overrides, message in (({"cache": "dual"}, "cache="), ({"deterministic": True}, "deterministic=True")):
        with pytest.raises(ValueError, match=message):
            sampler.generate([[1]], cuda_graphs=True, **overrides)
        assert sampler.generate([[1]], cuda_graphs=None, **overrides).finished.all()
    handle = sampler.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a hook waits"):
        sampler.generate([[1]], cuda_graphs=True)
    handle.remove()
    with pytest.raises(ValueError, match="autocast is on"), torch.autocast("cpu", torch.bfloat16):
        sampler.generate([[1]], cuda_graphs=True)
    sampler.policy = Own(0.5)
    with pytest.raises(ValueError, match=r"does not say that it can be captured"):
        sampler.infill(torch.tensor([[MASK]]), cuda_graphs=True)
    scripted = Sampler(ScriptedModel(torch.zeros(8, VOCAB)), config=SamplerConfig(8, 4, cuda_graphs=None))
    scripted.graphs = StepGraphs(RecordedCapture())
    assert scripted.why_no_graphs(scripted.config) == "ScriptedModel is not a ModelBase"
    assert scripted.why_no_graphs(scripted.config.updated({"cuda_graphs": True})) is None


def test_undefined_logits_are_an_error_and_leave_the_graphs_free() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, 3] = float("nan")
    sampler = Sampler(ScriptedModel(logits), config=SamplerConfig(max_new_tokens=4, block_length=4, cuda_graphs=True))
    sampler.graphs = StepGraphs(RecordedCapture())
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1\]"):
        sampler.generate([[1], [2]])
    assert not sampler.graphs.lock.locked()


def test_the_stand_in_bakes_numbers_in_and_computes_nothing_while_recording() -> None:
    x, factor = torch.ones(3), [2.0]

    def run() -> Any:
        x.mul_(factor[0])
        return x, x + 1.0

    replay, output = RecordedCapture()(run)
    assert x.tolist() == [1.0] * 3
    factor[0] = 5.0
    replay()
    assert x.tolist() == [2.0] * 3
    replay()
    assert output[1].tolist() == [5.0] * 3
    with pytest.raises(RuntimeError, match="waits"):
        RecordedCapture()(lambda: x.sum().item())

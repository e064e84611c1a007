"""Steps captured as CUDA graphs, one per shape and setting, on a state at fixed addresses.

The first two steps of a shape run uncaptured on this memory. The third is captured and then replayed, in later
generations too. All that is fixed in a graph is part of its key; it reads the seed, the tokens and the rows' numbers
from memory. Batches are padded with finished rows to a few sizes.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.models.base import ModelBase
from unmask.policies.base import Observation, UnmaskingPolicy, tensor_addresses
from unmask.sampling.config import SamplerConfig
from unmask.sampling.loop import Step
from unmask.sampling.state import COMPLETE, State

StepOutput = tuple[Observation, Tensor]
Capture = Callable[[Callable[[], StepOutput]], tuple[Callable[[], None], StepOutput]]
"""Records a step without running it; returns a function that runs it, and its output at a fixed address."""

WARM_UP = 2
"""Steps that run before one is captured, so that libraries are loaded and have their workspaces."""
WIDTH_STEP = 16
"""Padded canvases are padded to multiples of this many tokens."""
NOT_BAKED: dict[str, Any] = {
    **dict.fromkeys(("block_length", "alpha", "seed", "max_batch_size", "stop_ids"), None),
    **{"max_new_tokens": 1, "stop": (), "num_return_sequences": 1},
}
"""Fields of SamplerConfig that no captured step depends on, each with an allowed value."""


def why_no_graphs(model: Any, policy: UnmaskingPolicy, config: SamplerConfig) -> str | None:
    """The reason why steps cannot be captured, in words that follow "as"; None if they can be.

    A model that is no :class:`unmask.models.base.ModelBase` is captured only if the config asks for it, because its
    forward may depend on the host.
    """
    if config.cache in ("prefix", "dual"):
        return f'cache="{config.cache}" changes what is computed from step to step'
    if getattr(model, "attention", "bidirectional") != "bidirectional":
        return f"the window that a {model.attention} model computes grows from step to step"
    if config.deterministic:
        return "deterministic=True runs every row by itself"
    if not policy.graph_safe:
        return f"{policy.spec} does not say that it can be captured (graph_safe)"
    if not isinstance(model, ModelBase) and not config.cuda_graphs:
        return f"{type(model).__name__} is not a ModelBase"
    if not getattr(model, "graph_safe", True):
        return "the model's experts have no grouped product in this dtype on this device"
    if has_hooks(model) or has_hooks(policy.bare):
        return "a hook waits for every forward"
    if isinstance(model, nn.Module) and len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    if torch.is_autocast_enabled(torch.device(model.device).type):
        return "autocast is on"
    return None


def has_hooks(module: object) -> bool:
    """Whether a forward calls hooks on the host, which a replay would not."""
    if not isinstance(module, nn.Module):
        return False
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def batch_bucket(rows: int) -> int:
    """The batch size that ``rows`` are padded to, under an eighth more: 1 to 16, then 18, 20, ..., 32, 36, ..."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


class CudaCapture:
    """Captures steps on one device. All graphs share a memory pool, so only one may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], StepOutput]) -> tuple[Callable[[], None], StepOutput]:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate during the capture.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                output = run()
        except RuntimeError:
            self.pool = torch.cuda.graph_pool_handle()  # the old one may still be recording
            raise
        return graph.replay, output


@dataclass(frozen=True, eq=False)
class Key:
    """All that a captured step depends on. It keeps model and policy alive, so that addresses are not reused."""

    model: Any
    policy: UnmaskingPolicy
    values: tuple[Any, ...]

    @classmethod
    def of(cls, step: Step, state: State) -> Key:
        model, policy = step.forward.model, step.policy
        addresses = (tensor_addresses(model), policy.captured_state())
        mode = (torch.is_inference_mode_enabled(), torch.backends.cuda.matmul.fp32_precision)
        numbers = [getattr(state, f.name) for f in fields(state) if isinstance(getattr(state, f.name), (int, tuple))]
        optional = (state.attention, state.prompt, state.condition, state.editable, state.shift)
        shapes = tuple(None if t is None else t.shape[1:] for t in optional)
        shape = (state.rows.shape[0], state.tokens.shape[1], state.length, shapes)
        training = getattr(model, "training", None)
        return cls(model, policy, (policy.spec, step.config, addresses, training, mode, *numbers, *shape))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self.model is other.model and self.policy is other.policy and self.values == other.values

    def __hash__(self) -> int:
        return hash((id(self.model), id(self.policy), self.values))


class CapturedStep:
    """A step on a state of its own, captured after :data:`WARM_UP` runs."""

    def __init__(self, step: Step, like: State) -> None:
        """``like``: the padded state whose memory the captured step uses."""
        self.step, self.state, self.runs = step, like, 0
        self.replay: Callable[[], None] | None = None
        self.output: StepOutput | None = None

    def load(self, state: State) -> None:
        """Copy in the padded rows of ``state`` and the policy's memory of them."""
        self.state.seed.copy_(state.seed)
        for name, value in state.tensors():
            getattr(self.state, name).copy_(value)
        for name, own in self.state.memory.items():
            own.copy_(state.memory[name]) if name in state.memory else own.zero_()
        for name in state.memory.keys() - self.state.memory.keys():
            self.state.memory[name] = state.memory[name].clone()

    def __call__(self, capture: Capture) -> StepOutput:
        """Advance all rows by one step. Raises RuntimeError, before computing anything, if it cannot be captured."""
        if self.replay is None:
            if self.runs < WARM_UP:
                self.runs += 1
                return self.step(self.state)
            known = dict(self.state.memory)
            self.replay, self.output = capture(lambda: self.step(self.state))
            if self.state.memory.keys() != known.keys() or any(self.state.memory[n] is not known[n] for n in known):
                self.replay, self.state.memory = None, known
                raise RuntimeError("the policy replaces what it remembers, where it should write in place")
        self.replay()
        assert self.output is not None
        return self.output


class StepGraphs:
    """The captured steps of a Sampler, the most recently used last; the oldest are dropped beyond ``max_graphs``.

    Their memory is shared, so only the generation that holds ``lock`` may use them.
    """

    def __init__(self, capture: Capture, max_graphs: int = 32) -> None:
        self.capture, self.max_graphs = capture, max_graphs
        self.steps: OrderedDict[Key, CapturedStep] = OrderedDict()
        self.lock = threading.Lock()
        self.refused: set[Key] = set()

    def get(self, key: Key, step: Step, state: State) -> CapturedStep:
        """The step for ``key``, made from ``state`` if there is none. Steps of another model are dropped."""
        if key not in self.steps:
            self.steps = OrderedDict((k, s) for k, s in self.steps.items() if k.model is key.model)
            self.steps[key] = CapturedStep(step, state)
        self.steps.move_to_end(key)
        while len(self.steps) > self.max_graphs:
            self.steps.popitem(last=False)
        return self.steps[key]


class GraphRunner:
    """Advances rows by captured steps of :class:`StepGraphs`, whose lock it holds until closed."""

    def __init__(self, graphs: StepGraphs, step: Step, padding_id: int) -> None:
        self.graphs, self.padding_id = graphs, padding_id
        self.step = Step(step.forward, step.policy, step.config.updated(NOT_BAKED))
        self.current: CapturedStep | None = None

    def enter(self, state: State) -> State:
        count = state.rows.shape[0]
        if not count:
            return state
        padded = self.padded(state)
        self.key, self.policy_state = Key.of(self.step, padded), self.step.policy.captured_state()
        self.current = None
        if self.key in self.graphs.refused:
            return state
        self.current = self.graphs.get(self.key, self.step, padded)
        self.current.load(padded)
        return self.view(self.current.state, count, padded.tokens.shape[1] - state.tokens.shape[1])

    def padded(self, state: State) -> State:
        """``state`` with finished rows behind it and, if it has left padding, more of that."""
        rows, width = batch_bucket(state.rows.shape[0]) - state.rows.shape[0], state.tokens.shape[1]
        limit = getattr(self.step.forward.model, "max_length", None) or 2**62
        wider = 0 if state.attention is None else max(0, min(-width % WIDTH_STEP, limit - width))
        idle = state.take(torch.zeros(rows, dtype=torch.int64, device=state.rows.device))
        idle.status.fill_(COMPLETE)
        idle.allowed.fill_(False)
        values: dict[str, Any] = {name: torch.cat((value, getattr(idle, name))) for name, value in state.tensors()}
        for name, fill in (("tokens", self.padding_id), ("attention", False), ("prompt", False)):
            if name in values:
                values[name] = nn.functional.pad(values[name], (wider, 0), value=fill)
        memory = {
            name: torch.cat((value, value.new_zeros((rows, *value.shape[1:]))))
            for name, value in state.memory.items()
            if isinstance(value, Tensor)
        }
        return replace(state, **values, seed=state.seed.clone(), memory=memory, start=state.start + wider)

    def view(self, whole: State, count: int, pad: int) -> State:
        """The first ``count`` rows of the captured state, without the ``pad`` positions added by :meth:`padded`."""
        values: dict[str, Any] = {name: value[:count] for name, value in whole.tensors()}
        values |= {name: values[name][:, pad:] for name in ("tokens", "attention", "prompt") if name in values}
        memory = {name: value[:count] for name, value in whole.memory.items()}
        return replace(whole, **values, memory=memory, start=whole.start - pad)

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        if self.current is not None:  # of the rows that will be taken along
            self.step.forward.rearrange(keep, fresh)

    def __call__(self, state: State) -> StepOutput:
        """One step. Unless the config records, the output is a view that the next step overwrites."""
        self.step.attach()
        if self.current is None or self.policy_state != self.step.policy.captured_state():
            self.current = None  # the weights have changed since these rows entered
            return self.step(state)
        try:
            seen, rank = self.current(self.graphs.capture)
        except RuntimeError as error:
            warnings.warn(
                f"decoding without CUDA graphs, as a step could not be captured: {error}", RuntimeWarning, stacklevel=2
            )
            self.graphs.refused.add(self.key)
            self.graphs.steps.pop(self.key, None)
            self.current = None
            return self.step(state)
        count = state.rows.shape[0]
        state.memory = {name: value[:count] for name, value in self.current.state.memory.items()}
        keep = torch.clone if self.step.config.record else torch.Tensor.detach
        parts: dict[str, Any] = {n: keep(v[:count]) for n, v in vars(seen).items() if torch.is_tensor(v)}
        return replace(seen, **parts), keep(rank[:count])

    def close(self) -> None:
        """Let another generation use the captured steps."""
        self.graphs.lock.release()

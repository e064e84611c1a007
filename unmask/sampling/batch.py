"""The working rows of a generation: advanced kernel by kernel, or by captured steps."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unmask.models.base import ModelBase
from unmask.policies.base import UnmaskingPolicy
from unmask.sampling.canvas import Canvas
from unmask.sampling.capture import StepOutput
from unmask.sampling.config import SamplerConfig
from unmask.sampling.graph import GraphedStep, Owner, Shape, StepGraphs, each_tensor
from unmask.sampling.step import DenoisingStep, Distinct, rearranged


class Batch(Protocol):
    """Rows that are decoded side by side."""

    canvas: Canvas
    """The rows as they are."""

    def load(self, canvas: Canvas) -> None:
        """Start with these rows, which are the batch's from now on."""
        ...

    def rearrange(self, canvas: Canvas, keep: Tensor, fresh: int) -> None:
        """Go on with ``canvas``: rows ``keep`` (R,) of the present ones, in this order, then ``fresh`` new ones."""
        ...

    def advance(self, distinct: Distinct | None) -> StepOutput:
        """One step; see :class:`unmask.sampling.step.DenoisingStep`."""
        ...

    def advance_until(self, running: int) -> bool:
        """Queue steps until at most ``running`` rows are unfinished; False, and nothing done, if the host has to."""
        ...

    def close(self) -> None: ...


class EagerBatch:
    """Rows advanced by a step whose kernels are launched one by one."""

    def __init__(self, step: DenoisingStep) -> None:
        self.step = step

    def load(self, canvas: Canvas) -> None:
        self.canvas = canvas

    def rearrange(self, canvas: Canvas, keep: Tensor, fresh: int) -> None:
        self.canvas = canvas
        self.step.rearrange(keep, fresh)

    def advance(self, distinct: Distinct | None) -> StepOutput:
        return self.step(self.canvas, distinct)

    def advance_until(self, running: int) -> bool:
        return False

    def close(self) -> None:
        pass


class GraphedBatch:
    """Rows advanced by captured steps, which are kept for the next generation. Holds ``graphs`` until closed."""

    def __init__(
        self, graphs: StepGraphs, owner: Owner, config: SamplerConfig, eos: int | None, padding_id: int
    ) -> None:
        """``graphs`` have been acquired; ``owner`` is of ``config`` and ``eos``."""
        self.graphs, self.owner, self.config, self.eos, self.padding_id = graphs, owner, config, eos, padding_id
        self.current: GraphedStep | None = None
        graphs.forget_others(owner)

    def load(self, canvas: Canvas) -> None:
        self._enter(canvas, {})

    def rearrange(self, canvas: Canvas, keep: Tensor, fresh: int) -> None:
        assert self.current is not None
        self._enter(canvas, rearranged(self.current.step.memory, keep, fresh))

    def _enter(self, canvas: Canvas, memory: dict[str, Tensor]) -> None:
        self.canvas = canvas
        if not len(canvas.steps):
            return
        refused = self.graphs.refuses(self.owner)
        shape = Shape.of(canvas, getattr(self.owner.model, "max_length", None), exact=refused)

        def create() -> GraphedStep:
            return GraphedStep(self.owner, shape, canvas, self._make_step, self.padding_id)

        self.current = create() if refused else self.graphs.get(self.owner, shape, create)
        self.current.load(canvas, memory, self.config.seed or 0)
        self.canvas = self.current.view

    def _make_step(self, seed: Tensor) -> DenoisingStep:
        return DenoisingStep(self.owner.model, self.owner.policy, self.config, self.eos, seed=seed)

    def advance(self, distinct: Distinct | None) -> StepOutput:
        assert self.current is not None
        observation, rank = self.current(distinct, self.graphs)
        if not self.config.record:
            return observation, rank
        return each_tensor(observation, torch.clone), rank.clone()

    def advance_until(self, running: int) -> bool:
        return self.current is not None and self.current.loop(running, self.graphs)

    def close(self) -> None:
        self.graphs.release()


def why_no_graphs(
    model: Any, policy: UnmaskingPolicy, config: SamplerConfig, timed: bool, device: torch.device
) -> str | None:
    """Why a generation cannot be run by captured steps, in words that follow "as"; None if it can be.

    ``device``: where graphs are captured. A model that does not follow :class:`unmask.models.base.ModelBase` is
    captured only if the config asks for it, since nothing says that its forward is the same every time.
    """
    if config.cache != "none":
        return f'cache="{config.cache}" changes what is computed from step to step'
    if config.deterministic:
        return "deterministic=True runs every row by itself"
    if timed:
        return "a clock times its phases"
    if not policy.graph_safe:
        return f"{type(policy).__name__} does not say that it can be captured (graph_safe)"
    if not isinstance(model, ModelBase) and not config.cuda_graphs:
        return f"{type(model).__name__} is not a ModelBase"
    if has_hooks(model) or has_hooks(policy):
        return "a hook waits for every forward"
    if isinstance(model, nn.Module) and len({p.device for p in model.parameters()}) > 1:
        return "the model lies on several devices"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on"
    return None


def has_hooks(module: object) -> bool:
    """Whether a forward calls anything of the host's, which a replay would not."""
    if not isinstance(module, nn.Module):
        return False
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())

"""One denoising step: model, statistics of its logits, decision, commitment. Everything drives this one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.ops.random import philox_uniform
from unmask.policies.base import Decision, Observation, UnmaskingPolicy
from unmask.sampling.cache_plan import CachePlan, Part, buffer_positions
from unmask.sampling.canvas import Canvas
from unmask.sampling.clock import PhaseClock
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sharing import Distinct, SeenCanvases


class DenoisingStep:
    """A model, a policy and a configuration, ready to advance any canvas by one forward each call.

    Does not synchronise with the host and does not loop over rows (but for ``deterministic``).
    """

    def __init__(
        self,
        model: Any,
        policy: UnmaskingPolicy,
        config: SamplerConfig,
        eos: int | None,
        clock: PhaseClock | None = None,
        seed: Tensor | None = None,
    ) -> None:
        """``seed``: (1,) int64 on the model's device, read at every step in place of the config's."""
        self.model, self.policy, self.config, self.eos, self.clock = model, policy, config, eos, clock
        self.seed: int | Tensor = (config.seed or 0) if seed is None else seed
        wants_all = policy.full_context or "logits" in policy.needs
        self.block_only = not wants_all
        self.memory: dict[str, Any] = {}
        self.plan: CachePlan | None = None
        self.seen: SeenCanvases | None = None
        """Set to remember what the model said of recent canvases; only where :meth:`can_share`, and on the CPU."""
        if config.cache != "none":
            late = torch.device(model.device).type == "cuda" and not config.deterministic
            self.plan = CachePlan(model, config, self.block_only, late)

    def __call__(self, canvas: Canvas, distinct: Distinct | None = None) -> tuple[Observation, Tensor]:
        """Advance ``canvas`` in place; returns what the policy saw and the rank (N, L) of what it unmasked.

        With ``distinct`` the model runs on those rows alone, and their copies share what it says. A row that takes
        no step (finished, or held by the cache plan) is left as it is.
        """
        observation = self.observe(canvas, distinct)
        held = None if self.plan is None else self.plan.held(canvas)
        if held is None:
            with self.phase("policy"):
                decision = self.policy.decide(observation)
            return observation, self.commit(canvas, observation, decision)
        before = {name: value.clone() for name, value in self.memory.items() if isinstance(value, Tensor)}
        with self.phase("policy"):
            decision = self.policy.decide(observation)
        for name, value in before.items():
            self.memory[name].copy_(torch.where(held.view(-1, *(1,) * (value.ndim - 1)), value, self.memory[name]))
        canvas.done.logical_or_(held)
        rank = self.commit(canvas, observation, decision)
        canvas.done.logical_and_(~held)
        return observation, rank

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.clock is None else self.clock.phase(name)

    def can_share(self) -> bool:
        """Whether copies of a row see the same: not if tokens, or what the policy reads, are drawn per row.

        With a cache every row computes its own keys and values.
        """
        return self.config.temperature == 0 and not self.policy.needs and self.plan is None

    def observe(self, whole: Canvas, distinct: Distinct | None = None) -> Observation:
        """Run the model and reduce its logits to what the policy reads."""
        values = self.look(whole, distinct) if self.plan is None else self.look_and_recall(whole, self.plan)
        # The canvas changes in place, and so does what is recalled; what is kept beyond this step has to be a copy.
        keep = torch.clone if self.config.record else torch.Tensor.detach
        return Observation(
            mask=keep(whole.mask),
            allowed=keep(whole.allowed),
            steps=keep(whole.steps),
            length=whole.length,
            block_length=whole.block_length,
            uniform=self.uniform(whole) if "uniform" in self.policy.needs else None,
            alpha=whole.alpha,
            dial=whole.dial,
            memory=self.memory,
            **values,
        )

    def look(self, whole: Canvas, distinct: Distinct | None) -> dict[str, Tensor]:
        """What an observation says of the logits, by its fields (N, L, ...); outside the block 0 if nobody reads it."""
        if self.seen is not None:
            return self.seen.recall(whole, self.look_at)
        if distinct is None:
            return self.look_at(whole)
        return {name: values[distinct.copy_of] for name, values in self.look_at(whole.take(distinct.rows)).items()}

    def look_at(self, canvas: Canvas) -> dict[str, Tensor]:
        """The same for every row of ``canvas``, whatever it is a copy of."""
        block_only = self.block_only and canvas.block_length < canvas.length
        positions = active_positions(canvas) if block_only else None  # (N, BL) buffer positions
        with self.phase("model"):
            logits = self.forward(canvas, positions)  # (N, S, V) with S = L or BL

        def spread(values: Tensor) -> Tensor:
            """Block statistics (N, BL, ...) at their positions of the buffer (N, L, ...)."""
            if positions is not None:
                index = positions.reshape(*positions.shape, *(1,) * (values.ndim - 2)).expand_as(values)
                buffer = values.new_zeros((canvas.mask.shape[0], canvas.length, *values.shape[2:]))
                values = buffer.scatter_(1, index, values)
            return values

        return {name: spread(values) for name, values in self.statistics(canvas, logits, positions).items()}

    def look_and_recall(self, canvas: Canvas, plan: CachePlan) -> dict[str, Tensor]:
        """The same with a cache: of positions not recomputed, what was last known of them."""
        for part in plan.parts(canvas):
            rows = canvas if part.rows is None else canvas.take(part.rows)
            with self.phase("model"):
                logits = self.forward_part(rows, plan, part)
            plan.put(part, self.statistics(rows, logits, part.wanted), canvas.length)
        return {name: values.clone() if self.config.record else values for name, values in plan.known.items()}

    def statistics(self, canvas: Canvas, logits: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
        """What an observation says of ``logits`` (N, S, V), by its fields; ``positions`` (N, S), None: the buffer."""
        allowed = canvas.allowed if positions is None else canvas.allowed.gather(1, positions)
        stats = ops.topk_confidence(
            logits,
            self.policy.num_confidences,
            rows=None if self.policy.full_context else allowed,
            temperature=self.config.temperature,
            seed=self.seed,
            counter=self.counter(canvas, positions) if self.config.temperature > 0 else None,
            exclude=(self.model.mask_token_id,),
            entropy="entropy" in self.policy.needs,
        )
        values = {"confidence": stats.confidence, "token": stats.sample, "token_confidence": stats.sample_confidence}
        if stats.entropy is not None:
            values["entropy"] = stats.entropy
        if "logits" in self.policy.needs:
            values["logits"] = logits
        return values

    def forward_part(self, canvas: Canvas, plan: CachePlan, part: Part) -> Tensor:
        """Logits (N, S, V) of what ``part`` wants, for the rows of ``canvas`` that it names."""
        cache, wanted = plan.cache, part.wanted + canvas.start
        assert cache is not None
        if part.row is None:
            return self.model.forward_cached(canvas.tokens, canvas.attention, cache, wanted, part.computed, part.rows)
        pad = 0 if canvas.attention is None else int((~canvas.attention).sum())
        computed = None if part.computed is None else part.computed - pad
        return self.model.forward_cached(
            canvas.tokens[:, pad:], None, cache.alone(part.row, pad), wanted - pad, computed
        )

    def forward(self, canvas: Canvas, positions: Tensor | None) -> Tensor:
        """Logits of the whole buffer (N, L, V), or of the given buffer positions (N, BL, V)."""
        if self.config.deterministic:
            return self.forward_alone(canvas, positions)
        if positions is None:
            return self.model(canvas.tokens, canvas.attention, positions=slice(canvas.start, None))
        rows, width = canvas.tokens.shape
        flat = positions + canvas.start + torch.arange(rows, device=positions.device)[:, None] * width
        logits = self.model(canvas.tokens, canvas.attention, positions=flat.reshape(-1))
        return logits.view(*positions.shape, -1)

    def forward_alone(self, canvas: Canvas, positions: Tensor | None) -> Tensor:
        """The same logits with every row in a forward of its own, without its padding: slow, batch-independent."""
        outputs = []
        for i, row in enumerate(canvas.tokens):
            pad = 0 if canvas.attention is None else int((~canvas.attention[i]).sum())
            if positions is None:
                where: slice | Tensor = slice(canvas.start - pad, None)
            else:
                where = positions[i] + canvas.start - pad
            logits = self.model(row[None, pad:], None, positions=where)
            outputs.append(logits.reshape(-1, logits.shape[-1]))
        if not outputs:
            return self.model(canvas.tokens, None, positions=slice(canvas.start, None))
        return torch.stack(outputs)

    def commit(self, canvas: Canvas, observation: Observation, decision: Decision) -> Tensor:
        """Draw the action and write it to the canvas."""
        action = decision.logits if decision.select is None else decision.select
        if action is None or (decision.select is not None and decision.logits is not None):
            raise TypeError(f"{type(self.policy).__name__}.decide must set exactly one of select and logits")
        c = self.config
        return ops.unmask_(
            canvas.tokens,
            observation.token,
            action,
            mask=canvas.mask,
            allowed=canvas.allowed,
            steps=canvas.steps,
            remaining=canvas.remaining,
            block=canvas.block,
            done=canvas.done,
            status=canvas.status,
            start=canvas.start,
            block_length=canvas.block_length,
            max_steps=c.max_steps or canvas.length,
            mode=c.actions if decision.select is None else "select",
            eos=self.eos,
            temperature=c.policy_temperature,
            scale=c.policy_scale,
            seed=self.seed,
            sequence=canvas.sequence,
        )

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Follow a change of the working rows: ``keep`` (R,) rows stay, in this order, then come ``fresh`` new ones."""
        if self.plan is not None:
            self.plan.rearrange(keep, fresh)
        self.memory.update(rearranged(self.memory, keep, fresh))

    def counter(self, canvas: Canvas, positions: Tensor | None) -> Tensor:
        """(N, S, 3) int64: sequence, buffer position and step of every row of logits."""
        if positions is None:
            positions = torch.arange(canvas.length, device=canvas.mask.device).expand_as(canvas.mask)
        sequence = canvas.sequence[:, None].expand_as(positions)
        return torch.stack((sequence, positions, canvas.steps[:, None].expand_as(positions)), dim=-1)

    def uniform(self, canvas: Canvas) -> Tensor:
        """(N, L) float32 draws in (0, 1), one per position, row and step."""
        positions = torch.arange(canvas.length, device=canvas.mask.device)[None]
        return philox_uniform(self.seed, positions, canvas.steps[:, None], canvas.sequence[:, None])


def rearranged(memory: dict[str, Any], keep: Tensor, fresh: int) -> dict[str, Tensor]:
    """What a policy remembers of rows ``keep`` (R,), and zeros for ``fresh`` new ones; one entry per row each."""
    return {
        name: torch.cat((value[keep], value.new_zeros((fresh, *value.shape[1:]))))
        for name, value in memory.items()
        if isinstance(value, Tensor)
    }


def active_positions(canvas: Canvas) -> Tensor:
    """(N, BL) int64 buffer positions of each row's active block; past the end, the last position again."""
    return buffer_positions(canvas, canvas.block, canvas.block_length)

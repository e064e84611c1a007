"""The forwards of a generation: which rows and positions the model computes, and the statistics of its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.models.watch import Watch
from unmask.policies.base import UnmaskingPolicy
from unmask.sampling.blocks import BlockPlan
from unmask.sampling.cache import CachePlan, Part
from unmask.sampling.config import SamplerConfig
from unmask.sampling.logits import guided
from unmask.sampling.state import State
from unmask.sampling.step import Statistics, narrows, prepared, spread, statistics


class Forward:
    """Computes the statistics of the logits of any state.

    It does not wait for the device, and loops over rows only for ``deterministic``.
    """

    def __init__(
        self, model: Any, policy: UnmaskingPolicy, config: SamplerConfig, seen: SeenStates | None = None
    ) -> None:
        """``seen`` shares forwards between equal rows; it needs :func:`can_share` and the CPU."""
        self.model, self.policy, self.config, self.seen = model, policy, config, seen
        self.block_only = not (policy.full_context or policy.everywhere)
        self.plan: CachePlan | None = None
        late = torch.device(model.device).type == "cuda" and not config.deterministic
        self.blocks = None if model_attention(model) == "bidirectional" else BlockPlan(model, config, late)
        if config.cache in ("prefix", "dual"):
            self.plan = CachePlan(model, config, self.block_only, late)

    def __call__(self, state: State) -> Statistics:
        """Fields of an observation (N, L, ...), 0 outside the active block if the policy does not read them there."""
        if self.blocks is not None:
            logits, positions = self.blocks.logits(state)
            return self.reduced(logits, state, positions)
        if self.plan is not None:
            return self.recalled(state, self.plan)
        return self.computed(state) if self.seen is None else self.seen.recall(state, self.computed)

    def computed(self, state: State) -> Statistics:
        """The statistics by one forward over the whole canvas."""
        state = replace(state, ready=prepared(state, self.policy))
        assert state.ready is not None
        block = state.ready.positions  # (N, BL)
        positions = block if self.block_only else None
        if "attention" not in self.policy.needs:
            return self.reduced(self.logits(state, positions), state, positions)
        every = torch.arange(state.length, device=state.rows.device).expand(len(state.rows), -1)
        watch = Watch((every if block is None else block) + state.start, self.policy.attention_layers)
        values = self.reduced(self.logits(state, positions, watch), state, positions)
        return values | {"attention": watch.attention} | ({} if block is None else {"positions": block})

    def reduced(self, logits: Tensor, state: State, positions: Tensor | None) -> Statistics:
        """The statistics of ``logits`` at ``positions``, over the buffer."""
        if positions is not None and self.blocks is None and not narrows(self.config):
            return statistics(logits, state, self.policy, self.config, positions, spreads=True)
        return spread(statistics(logits, state, self.policy, self.config, positions), positions, state.length)

    def recalled(self, state: State, plan: CachePlan) -> Statistics:
        """The statistics over a cache; positions that are not recomputed keep their last ones."""
        for part in plan.parts(state):
            rows = state if part.rows is None else state.take(part.rows)
            logits = self.part_logits(rows, plan, part)
            plan.put(part, statistics(logits, rows, self.policy, self.config, part.wanted), state.length)
        return {name: values.clone() if self.config.record else values for name, values in plan.known.items()}

    def logits(self, state: State, positions: Tensor | None, watch: Watch | None = None) -> Tensor:
        """Logits of the whole buffer (N, L, V), or of the given buffer positions (N, S, V), after any guidance."""
        logits = self.plain_logits(state, positions, watch)
        if not self.config.cfg_scale:
            return logits
        assert state.prompt is not None
        blind = replace(state, tokens=state.tokens.masked_fill(state.prompt, state.mask_token_id))
        return guided(logits, self.plain_logits(blind, positions), self.config.cfg_scale)

    def plain_logits(self, state: State, positions: Tensor | None, watch: Watch | None = None) -> Tensor:
        """The logits of one forward."""
        if self.config.deterministic:
            return self.logits_alone(state, positions, watch)
        watching: dict[str, Any] = {} if watch is None else {"watch": watch}
        if positions is None:
            return self.model(state.tokens, state.attention, positions=slice(state.start, None), **watching)
        assert state.ready is not None
        assert state.ready.places is not None
        logits = self.model(state.tokens, state.attention, positions=state.ready.places.reshape(-1), **watching)
        return logits.view(*positions.shape, -1)

    def logits_alone(self, state: State, positions: Tensor | None, watch: Watch | None = None) -> Tensor:
        """The same logits by one forward per row without its padding, so that rounding does not depend on the batch."""
        outputs, attended = [], []
        for i, row in enumerate(state.tokens):
            pad = 0 if state.attention is None else int((~state.attention[i]).sum())
            if positions is None:
                where: slice | Tensor = slice(state.start - pad, None)
            else:
                where = positions[i] + state.start - pad
            if watch is None:
                logits = self.model(row[None, pad:], None, positions=where)
            else:
                own = Watch(watch.positions[i : i + 1] - pad, watch.layers)
                logits = self.model(row[None, pad:], None, positions=where, watch=own)
                attended.append(nn.functional.pad(own.attention, (pad, 0)))
            outputs.append(logits.reshape(-1, logits.shape[-1]))
        if not outputs:
            return self.model(state.tokens, None, positions=slice(state.start, None))
        if watch is not None:
            watch.attention = torch.cat(attended)
        return torch.stack(outputs)

    def part_logits(self, state: State, plan: CachePlan, part: Part) -> Tensor:
        """Logits (N, S, V) of the positions that ``part`` wants; ``state`` holds its rows."""
        cache, wanted = plan.cache, part.wanted + state.start
        assert cache is not None
        if part.row is None:
            return self.model.forward_cached(state.tokens, state.attention, cache, wanted, part.computed, part.rows)
        pad = 0 if state.attention is None else int((~state.attention).sum())
        computed = None if part.computed is None else part.computed - pad
        if computed is not None:  # a shifted model looks back at the prompt's last token, which may be missing
            computed = torch.where(computed < 0, state.tokens.shape[1] - pad, computed)
        return self.model.forward_cached(
            state.tokens[:, pad:], None, cache.alone(part.row, pad), wanted - pad, computed
        )

    @property
    def seeding(self) -> Tensor | None:
        """(N,) bool: rows that get only the seed of a block in this step; None: there are none."""
        return None if self.blocks is None else self.blocks.seeding

    def held(self, state: State) -> Tensor | None:
        """(N,) bool: rows for which this forward is discarded; None: none can be."""
        return None if self.plan is None else self.plan.held(state)

    def rearrange(self, keep: Tensor, fresh: int) -> None:
        """Keep the state of rows ``keep`` (K,), in this order, and make room for ``fresh`` new ones behind them."""
        for plan in (self.plan, self.blocks):
            if plan is not None:
                plan.rearrange(keep, fresh)


def can_share(policy: UnmaskingPolicy, config: SamplerConfig) -> bool:
    """Whether equal rows have equal statistics. They do not if something is drawn per row, or with a cache."""
    drawn = config.temperature or policy.needs or policy.edits
    return not (drawn or config.cfg_scale or config.cache in ("prefix", "dual"))


def model_attention(model: Any) -> str:
    """How the tokens of ``model`` see each other, see :class:`unmask.models.base.ModelBase`."""
    return str(getattr(model, "attention", "bidirectional"))


def shows_attention(model: Any, config: SamplerConfig) -> bool:
    """Whether policies may read the attention of ``model``."""
    shown = getattr(model, "shows_attention", False) and model_attention(model) == "bidirectional"
    return bool(shown) and config.cache not in ("prefix", "dual")


class SeenStates:
    """Statistics of the latest ``capacity`` canvases, so that rollouts with equal canvases share a forward.

    Rollouts of a prompt begin alike, and some reach the same canvas after different numbers of steps. The tokens are
    read on the host, so this is for the CPU.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._place: dict[bytes, int] = {}  # of each canvas in the store, the least recently used first
        self._store: Statistics = {}  # (capacity, L, ...) per field

    def recall(self, state: State, compute: Callable[[State], Statistics]) -> Statistics:
        """``compute(state)``, called only for rows that are not in the store, and once for equal rows.

        Raises ValueError if ``state`` has more rows than the store.
        """
        keys = row_keys(state)
        if len(keys) > self.capacity:
            raise ValueError(f"state: expected at most {self.capacity} rows, got {len(keys)}")
        fresh: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key in self._place:
                self._place[key] = self._place.pop(key)  # now the most recently used
            else:
                fresh.setdefault(key, row)
        if fresh:
            self._keep(list(fresh), compute(state.take(torch.tensor(list(fresh.values())))))
        places = torch.tensor([self._place[key] for key in keys])
        return {name: values[places] for name, values in self._store.items()}

    def _keep(self, keys: list[bytes], said: Statistics) -> None:
        """Store the statistics ``said`` of ``keys`` in place of the least recently used."""
        for key in keys:
            full = len(self._place) == self.capacity
            self._place[key] = self._place.pop(next(iter(self._place))) if full else len(self._place)
        places = torch.tensor([self._place[key] for key in keys])
        for name, values in said.items():
            if name not in self._store:
                self._store[name] = values.new_empty((self.capacity, *values.shape[1:]))
            self._store[name][places] = values


def row_keys(state: State) -> list[bytes]:
    """For each row what its statistics depend on: its tokens and padding, and whether it is done."""
    parts = [state.tokens, state.done[:, None]] + ([] if state.attention is None else [state.attention])
    return [row.tobytes() for row in torch.cat(parts, dim=1).numpy()]

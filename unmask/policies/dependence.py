"""Rules that read attention, to see which positions depend on each other.

Two positions may each be certain alone and wrong together. These rules take the attention of the last layers as a sign
of dependence, and do not commit dependent positions in the same step unless both are certain. An attention weight is a
share of the whole canvas, so the bounds suit canvases of a few hundred tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.ops.reference.choose import comparable, independent
from unmask.policies.base import Observation
from unmask.policies.heuristics import Heuristic, Parameter, required


class Block:
    """The active block of each row, S positions, and what its predictions attend to."""

    def __init__(self, o: Observation) -> None:
        attention = required(o, "attention")  # (B, S, T)
        index = torch.arange(o.length, device=attention.device).expand(attention.shape[0], -1)
        self.length = o.length
        self.positions = index if o.positions is None else o.positions
        again = torch.nn.functional.pad(self.positions[:, 1:] == self.positions[:, :-1], (1, 0))
        self.allowed = self.cut(o.allowed) & ~again  # the last position may repeat
        self.columns = (self.positions + attention.shape[2] - o.length)[:, None].expand(-1, attention.shape[1], -1)
        self.attention = attention.scatter(2, self.columns.diagonal(dim1=1, dim2=2)[..., None], 0.0)

    def cut(self, values: Tensor) -> Tensor:
        """(B, L) -> (B, S)."""
        return values.gather(1, self.positions)

    def spread(self, chosen: Tensor) -> Tensor:
        """(B, S) bool -> (B, L) bool."""
        buffer = torch.zeros((len(chosen), self.length), dtype=torch.int64, device=chosen.device)
        return buffer.scatter_add(1, self.positions, chosen.long()) > 0


class Dawn(Heuristic):
    """Positions of CONF; of NEAR if they read a settled token; of REST if they depend on no other (DAWN, 2602.06953).

    Position i depends on j where its attention to j is at least EDGE. Tokens that the masked positions of the block
    read with more than SINK on average do not count. Settled are the prompt, and committed tokens to which the model
    still gives CONF. Positions of the third kind depend on none of the first two; of those that depend on each other,
    the most probable is taken.
    """

    name = "dawn"
    parameters = (
        Parameter("CONF", float, 0.0, 1.0, example=0.9),
        Parameter("NEAR", float, 0.0, 1.0, default=0.75),
        Parameter("REST", float, 0.0, 1.0, default=0.75),
        Parameter("EDGE", float, 0.0, 1.0, default=0.07),
        Parameter("SINK", float, 0.0, 1.0, default=0.01),
    )
    needs = frozenset({"attention"})
    attention_layers = 4
    full_context = True  # it reads the probabilities of committed tokens

    def picked(self, o: Observation) -> Tensor:
        block = Block(o)
        conf, near, rest, edge, sink = self.values
        asking = block.allowed[..., None]
        incoming = (block.attention * asking).sum(dim=1) / asking.sum(dim=1).clamp_min(1)  # (B, T)
        depends = (block.attention >= edge) & (incoming <= sink)[:, None]  # (B, S, T)
        settled = ~o.mask & (o.candidates == o.tokens) & (o.confidence[..., 0] >= conf)
        known = torch.nn.functional.pad(settled, (depends.shape[2] - o.length, 0), value=True)
        c = block.cut(comparable(o.token_confidence, o.allowed))  # (B, S)
        among = depends.gather(2, block.columns)  # (B, S, S)
        chosen = block.allowed & ((c >= conf) | ((c >= near) & (depends & known[:, None]).any(dim=2)))
        free = block.allowed & ~chosen & (c >= rest) & ~(among & chosen[:, None]).any(dim=2)
        return block.spread(chosen | independent(free, c, among | among.transpose(1, 2), free.shape[1]))


class Dapd(Heuristic):
    """The most probable positions of which no two attend to each other with EDGE on average (after DAPD, 2603.12996).

    It takes an independent set of the graph of attention between masked positions, from the most probable on, and of
    these only positions of at least CONF.
    """

    name = "dapd"
    parameters = (
        Parameter("EDGE", float, 0.0, 1.0, example=0.02),
        Parameter("CONF", float, 0.0, 1.0, default=0.0),
    )
    needs = frozenset({"attention"})
    attention_layers = 4

    def picked(self, o: Observation) -> Tensor:
        block = Block(o)
        among = block.attention.gather(2, block.columns)
        conflict = (among + among.transpose(1, 2)) / 2 >= self.values[0]
        c = block.cut(comparable(o.token_confidence, o.allowed))
        return block.spread(independent(block.allowed & (c >= self.values[1]), c, conflict, c.shape[1]))

"""Set policies: a small network that sees the proposed tokens and builds the set to commit within one step.

For every masked position the network predicts the probability that its present proposal survives, given the proposals
picked so far: that a careful decode which goes on from there ends with the same token. The policy picks what is sure,
then the surest next with the network run again, while the summed -log p stays below the risk, which is its dial.
:mod:`unmask.training.labels` has what it learns from, without a grader.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from unmask import ops
from unmask.ops.reference.checks import wide_dtype
from unmask.ops.reference.policy_forward import rotary_frequencies
from unmask.ops.reference.select_set import (
    MOST_LAYERS,
    NUM_PERIODS,
    num_numbers,
    prior_logit,
    read_proposals,
    selected,
    set_inputs,
    set_logits,
)
from unmask.policies.base import Decision, Observation, tensor_addresses
from unmask.policies.config import SetPolicyConfig
from unmask.policies.packing import Packing, kernels_take
from unmask.policies.pretrained import Pretrained

PERIODS = (2.2, 64.0)
"""Shortest and longest period, in positions, of the sinusoids that tell a place in the buffer."""
TABLE_ROWS = 8192
"""Rows of the model's embedding that are projected at a time."""


class Attached(threading.local):
    """The model's embedding of one thread, whose steps another thread's with another model do not disturb."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        """(V, E), on the policy's device."""
        self.packing = Packing()
        """Of its projection."""

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        """A copy has none."""
        return Attached, ()


@dataclass
class SetInputs:
    """What the network reads of M states of L positions, before anything is picked."""

    tokens: Tensor
    """(M, L) int64: the proposal where there is one, else the token in the buffer."""
    mask: Tensor
    """(M, L) bool: masked."""
    confidence: Tensor
    """(M, L, k) float32: the largest probabilities, 0 where there is no proposal."""
    probability: Tensor
    """(M, L) float32: the proposal's, 0 where there is none."""

    @classmethod
    def of(cls, o: Observation) -> SetInputs:
        """The inputs of one step."""
        proposals = proposed(o)
        tokens, confidence, probability = read_proposals(proposals)
        return cls(tokens, proposals.mask, confidence, probability)

    @property
    def prior(self) -> Tensor:
        """(M, L): logit of the proposal's probability, to which the network adds."""
        return prior_logit(self.probability)


def proposed(o: Observation) -> ops.Proposals:
    """The proposals of one step: those of the masked positions of the active block."""
    if o.tokens is None:
        raise ValueError("a set policy needs observation.tokens, which are None")
    region = o.allowed if o.region is None else o.region
    return ops.Proposals(o.tokens, o.candidates, o.mask, region, o.confidence, o.token_confidence, o.bias)


class SetLayer(nn.Module):
    """Parameters of one layer, in the op's order."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, ffn), nn.Linear(ffn, width)
        for part in (self.out, self.down):
            nn.init.normal_(part.weight, std=0.02)


class SetPolicy(Pretrained):
    """Commits in each step a set of proposals that the network expects to survive together.

    It is conditioned on the risk, which takes the place of alpha: ``SamplerConfig(alpha=0.1)``. The larger, the faster.
    """

    config: SetPolicyConfig
    config_type = SetPolicyConfig
    model_type = "unmask-set-policy"
    conditioned = graph_safe = True
    dial = "alpha"
    frequencies: Tensor
    places: Tensor
    pairs: Tensor

    def __init__(self, config: SetPolicyConfig) -> None:
        super().__init__()
        c = self.config = config
        self.num_confidences, self.default_alpha = c.num_confidences, c.default_risk
        width = c.hidden_size
        if c.embedding_size is None:
            self.tokens: nn.Embedding | nn.Linear = nn.Embedding(c.vocab_size, width)
        else:
            self.tokens = nn.Linear(c.embedding_size, width, bias=False)
        self.numbers, self.state = nn.Linear(c.num_confidences + 2, width), nn.Embedding(3, width)
        self.share = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        (low, high), count = PERIODS, NUM_PERIODS
        self.place = nn.Linear(2 * count, width, bias=False)
        self.layers = nn.ModuleList(SetLayer(width, c.ffn_size) for _ in range(c.num_layers))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 1)
        nn.init.normal_(self.tokens.weight, std=0.5 / (c.embedding_size or 1) ** 0.5)
        nn.init.normal_(self.place.weight, std=0.5 / count**0.5)
        for p in self.output.parameters():
            nn.init.zeros_(p)  # a fresh policy believes the model's probabilities
        periods = torch.logspace(math.log10(low), math.log10(high), count)
        halves = torch.arange(width).view(c.num_heads, 2, -1).transpose(1, 2).reshape(-1)  # pairs of channels together
        pairs = torch.cat((halves, width + halves, torch.arange(2 * width, 3 * width)))
        self.register_buffer("frequencies", rotary_frequencies(width // c.num_heads), persistent=False)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("places", 2 * math.pi / periods, persistent=False)
        self._packing, self._attached = Packing(), Attached()
        self._known = WeakIdKeyDictionary()
        """From each model's embedding to where it was, and the ``table`` and ``packing`` of :class:`Attached`."""
        self._packed_parts = [part for part in self.modules() if part is not self.tokens and part._parameters]

    @property
    def decoding(self) -> dict[str, Any]:
        return self.config.decoding()

    @property
    def reads(self) -> str:
        own = "an embedding of its own" if self.config.embedding_size is None else "the model's embedding"
        return f"{self.config.num_confidences} confidences, proposed tokens ({own}), mask, risk"

    def attach(self, model: Any) -> None:
        """Take the embedding of ``model`` if the network reads it; ValueError for another vocabulary or width."""
        c = self.config
        if model.vocab_size != c.vocab_size:
            raise ValueError(
                f"the set policy reads tokens of a vocabulary of {c.vocab_size}, but the model has {model.vocab_size}: "
                "decode with the model that it was trained on"
            )
        if c.embedding_size is None:
            return
        table = getattr(model, "embedding", None)
        shape = None if table is None else tuple(table.shape)
        if table is None or shape != (c.vocab_size, c.embedding_size):
            raise ValueError(
                f"the set policy reads an embedding of shape {(c.vocab_size, c.embedding_size)}, the model's is {shape}"
            )
        device = self.state.weight.device
        place, known = (table.data_ptr(), table.dtype, device), self._known.get(table)
        if known is None or known[0] != place:
            known = self._known[table] = (place, table.detach().to(device), Packing())
        _, self._attached.table, self._attached.packing = known

    def embed(self, tokens: Tensor) -> Tensor:
        """(..., D): the embedding of ``tokens``, or the projection of the model's."""
        if isinstance(self.tokens, nn.Embedding):
            return F.embedding(tokens, self.tokens.weight)
        return self._projected(F.embedding(tokens, self._model_table()))

    def table(self) -> Tensor:
        """(V, D): what :meth:`embed` gives for every token, kept until a weight changes."""
        if isinstance(self.tokens, nn.Embedding):
            return self.tokens.weight
        rows = self._model_table()
        packed = self._attached.packing(
            [self.tokens.weight, rows], lambda: [self._projected(some) for some in rows.split(TABLE_ROWS)]
        )
        return packed.view(len(rows), -1).to(self.state.weight.dtype)

    def _model_table(self) -> Tensor:
        if (table := self._attached.table) is None:
            raise ValueError("the set policy reads the model's embedding: call attach(model), as a Sampler does")
        return table

    def _projected(self, rows: Tensor) -> Tensor:
        """(..., D): the projection of rows (..., E) of the model's embedding."""
        known = rows.to(self.state.weight.dtype)
        return F.linear(F.layer_norm(known, known.shape[-1:]), self.tokens.weight)

    @property
    def weights(self) -> list[Tensor]:
        """All parameters but the embedding, as the op takes them.

        The two channels of a rotary pair of this network are half a head apart, those of the op are neighbours.
        """
        read = torch.cat((self.numbers.weight, self.place.weight), dim=1)
        numbers = F.pad(read, (0, num_numbers(self.config.num_confidences) - read.shape[1]))
        layers = [p[self.pairs] if ".qkv." in name else p for name, p in self.layers.named_parameters()]
        return [
            *(self.places, self.state.weight, numbers, self.numbers.bias, *self.share.parameters()),
            *(*layers, *self.norm.parameters(), *self.output.parameters()),
        ]

    def packed_weights(self) -> ops.SetWeights:
        """The current weights in the layout of :func:`unmask.ops.select_set`; see :class:`Packing`."""
        c, own = self.config, (p for part in self._packed_parts for p in part._parameters.values())
        packed = self._packing([p for p in own if p is not None], lambda: self.weights)
        return ops.SetWeights(packed, c.hidden_size, c.num_heads, c.ffn_size, c.num_layers)

    def _kernel_takes(self) -> bool:
        c = self.config
        sizes = (c.hidden_size, c.num_heads, c.ffn_size, c.num_confidences)
        return c.num_layers <= MOST_LAYERS and kernels_take(self.state.weight, *sizes)

    def forward(self, inputs: SetInputs, picked: Tensor) -> Tensor:
        """Differentiable logits (M, L) that a proposal survives once ``picked`` (M, L) bool are committed."""
        weights, i = self.weights, inputs
        x = set_inputs(weights, self.embed(i.tokens), i.mask, i.confidence, i.probability)
        x = x + picked[..., None] * (self.state.weight[2] - self.state.weight[1])
        return i.prior + set_logits(x, weights, self.frequencies)

    @torch.no_grad()
    def decide(self, observation: Observation) -> Decision:
        if not self._kernel_takes():
            turn, score = self.turns(observation)
            return Decision(select=turn > 0, score=score.float())
        select, score = ops.select_set(self.packed_weights(), *self._given(observation))
        return Decision(select=select, score=score)

    @torch.no_grad()
    def turns(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """(B, L) int64: 0 outside the set of this step, else which run of the network picked it; and scores (B, L)."""
        table, proposals, allowed, risk, *limits = self._given(observation)
        wide = wide_dtype(risk.device)  # see unmask.ops.reference.select_set
        weights = [w.to(wide) for w in self.weights]
        return selected(weights, self.frequencies.to(wide), table, proposals, allowed, risk.to(wide), *limits)

    def _given(self, o: Observation) -> tuple[Any, ...]:
        """What the op takes beside the weights."""
        c = self.config
        risk = o.token_confidence.new_full((len(o.mask),), c.default_risk) if o.alpha is None else o.alpha.float()
        return self.table(), proposed(o), o.allowed, risk, c.sure, c.max_runs

    def captured_state(self) -> tuple[int, ...]:
        packed = [self.packed_weights().packed] if self._kernel_takes() else []
        return (*tensor_addresses(self), *(t.data_ptr() for t in (self.table(), *packed)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the model's embedding, which a Sampler gives again."""
        return {**self.__dict__, "_attached": Attached(), "_known": WeakIdKeyDictionary()}

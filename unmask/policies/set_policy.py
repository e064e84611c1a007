"""Set policies: a small network that sees the proposed tokens and builds the set to commit within one step.

For every masked position the network predicts the probability that its present proposal survives, given the proposals
picked so far: that a careful decode which goes on from there ends with the same token. The policy picks what is sure,
then the surest next with the network run again, while the summed -log p stays below the risk, which is its dial.
:mod:`unmask.training.labels` has what it learns from, without a grader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.ops.reference.policy_forward import rotary_frequencies
from unmask.ops.reference.select_set import select_set, set_logits
from unmask.policies.base import Decision, Observation, tensor_addresses
from unmask.policies.config import SetPolicyConfig
from unmask.policies.pretrained import Pretrained

LEAST = 1e-4
"""Probabilities are clamped to [LEAST, 1 - LEAST] before their logit or logarithm is taken."""
PERIODS = (2.2, 64.0, 16)
"""Shortest and longest period in positions, and number, of the sinusoids that tell a place in the buffer."""


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
        """The inputs of one step: proposals are those of the masked positions of the active block."""
        if o.tokens is None:
            raise ValueError("a set policy needs observation.tokens, which are None")
        region = o.allowed if o.region is None else o.region
        return cls(
            tokens=torch.where(region, o.candidates, o.tokens).clamp_min(0),
            mask=o.mask,
            confidence=torch.where(region[..., None], o.confidence.nan_to_num(0.0), 0.0),
            probability=torch.where(region, o.token_confidence.nan_to_num(0.0), 0.0),
        )

    def take(self, index: Tensor) -> SetInputs:
        """The states at ``index``."""
        return SetInputs(**{name: value[index] for name, value in vars(self).items()})

    @property
    def prior(self) -> Tensor:
        """(M, L): logit of the proposal's probability, to which the network adds."""
        return torch.logit(self.probability.clamp(LEAST, 1 - LEAST))


class SetLayer(nn.Module):
    """Parameters of one layer, in the order of :func:`unmask.ops.reference.select_set.set_logits`."""

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
        low, high, count = PERIODS
        self.place = nn.Linear(2 * count, width, bias=False)
        self.layers = nn.ModuleList(SetLayer(width, c.ffn_size) for _ in range(c.num_layers))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, 1)
        nn.init.normal_(self.tokens.weight, std=0.5 / (c.embedding_size or 1) ** 0.5)
        nn.init.normal_(self.place.weight, std=0.5 / count**0.5)
        for p in self.output.parameters():
            nn.init.zeros_(p)  # a fresh policy believes the model's probabilities
        periods = torch.logspace(math.log10(low), math.log10(high), count)
        self.register_buffer("frequencies", rotary_frequencies(width // c.num_heads), persistent=False)
        self.register_buffer("places", 2 * math.pi / periods, persistent=False)
        self._table: Tensor | None = None

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
        self._table = table.detach().to(self.state.weight.device)

    def embed(self, inputs: SetInputs) -> Tensor:
        """(M, L, D): the network's inputs where nothing is picked."""
        p = inputs.probability
        numbers = (inputs.confidence, p[..., None], p.clamp_min(LEAST).log()[..., None])
        x = self.numbers(torch.cat(numbers, dim=-1)) + self.state(inputs.mask.long())
        committed = 1 - inputs.mask.to(p.dtype).mean(dim=1)
        x = x + self.share(4 * committed[:, None])[:, None]
        angles = torch.arange(p.shape[1], device=p.device)[:, None] * self.places
        x = x + self.place(torch.cat((angles.cos(), angles.sin()), dim=-1))
        if isinstance(self.tokens, nn.Embedding):
            return x + self.tokens(inputs.tokens)
        if self._table is None:
            raise ValueError("the set policy reads the model's embedding: call attach(model), as a Sampler does")
        known = F.embedding(inputs.tokens, self._table).to(p.dtype)
        return x + self.tokens(F.layer_norm(known, known.shape[-1:]))

    @property
    def change(self) -> Tensor:
        """(D,): what being picked adds to the inputs of a position."""
        return self.state.weight[2] - self.state.weight[1]

    @property
    def weights(self) -> list[Tensor]:
        """The parameters of the layers and the output, in the order of ``set_logits``."""
        return [*self.layers.parameters(), *self.norm.parameters(), *self.output.parameters()]

    def forward(self, inputs: SetInputs, picked: Tensor) -> Tensor:
        """Differentiable logits (M, L) that a proposal survives once ``picked`` (M, L) bool are committed."""
        x = self.embed(inputs) + picked[..., None] * self.change
        return inputs.prior + set_logits(x, self.weights, self.config.num_heads, self.frequencies)

    @torch.no_grad()
    def decide(self, observation: Observation) -> Decision:
        o, c = observation, self.config
        inputs = SetInputs.of(o)
        risk = torch.full_like(inputs.probability[:, 0], c.default_risk) if o.alpha is None else o.alpha.float()
        prior = inputs.prior if o.bias is None else inputs.prior + o.bias
        network = (self.embed(inputs), self.change, self.weights, c.num_heads, self.frequencies)
        select, score = select_set(*network, prior, o.allowed, risk, c.sure, c.max_runs)
        return Decision(select=select, score=score)

    def captured_state(self) -> tuple[int, ...]:
        return (*tensor_addresses(self), *(() if self._table is None else (self._table.data_ptr(),)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the model's embedding, which a Sampler gives again."""
        return {**self.__dict__, "_table": None}

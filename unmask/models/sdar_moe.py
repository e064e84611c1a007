"""SDAR with experts (SDAR-30B-A3B): Qwen3's mixture, block-causal."""

from __future__ import annotations

from typing import Any

from unmask.config import Count, PositiveInt, require
from unmask.models.sdar import SDARConfig
from unmask.models.transformer import TransformerConfig


class SDARMoeConfig(SDARConfig, kw_only=True):
    """Keys of Qwen3-MoE's configuration."""

    MODEL_TYPE = "sdar_moe"

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    norm_topk_prob: bool = False
    decoder_sparse_step: PositiveInt = 1
    mlp_only_layers: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        fits = all(i < self.num_layers for i in self.mlp_only_layers)
        layers = list(self.mlp_only_layers)
        require(fits, f"mlp_only_layers must be below num_hidden_layers={self.num_layers}, got {layers}")

    def sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def decoder(self, **settings: Any) -> TransformerConfig:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        sparse = tuple(filter(self.sparse, range(self.num_layers)))
        return super().decoder(mixture={name: getattr(self, name) for name in names} | {"sparse_layers": sparse})

"""SDAR with experts (SDAR-30B-A3B): Qwen3's mixture, block-causal."""

from __future__ import annotations

from unmask.config import Count, PositiveInt, require
from unmask.models.config_values import Raw, read
from unmask.models.qwen import weight_names
from unmask.models.sdar import SDARConfig
from unmask.models.transformer import TransformerConfig

__all__ = ["MODEL_TYPE", "read_config", "weight_names"]

MODEL_TYPE = "sdar_moe"


class SDARMoeConfig(SDARConfig, kw_only=True):
    """Keys of Qwen3-MoE's configuration."""

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


def read_config(raw: Raw) -> TransformerConfig:
    """Raises ValueError naming a key with a value that this decoder does not implement."""
    c = read(SDARMoeConfig, raw)
    mixture = {name: getattr(c, name) for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
    mixture |= {"norm_topk_prob": c.norm_topk_prob, "sparse_layers": tuple(filter(c.sparse, range(c.num_layers)))}
    return c.decoder(mixture=mixture)

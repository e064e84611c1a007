"""LLaDA2.0 and 2.1 (arXiv 2512.15745, 2602.08676): experts chosen in groups, partial rotation, block-causal.

Both versions have one architecture; that 2.1 revises tokens is a setting of decoding.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from unmask.config import Count, Positive, PositiveInt, require
from unmask.models.config_values import Raw
from unmask.models.pieces import Names, Piece, feed_forward_names
from unmask.models.qwen import QwenConfig
from unmask.models.transformer import Transformer, TransformerConfig

OF_MIXTURE = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group", "routed_scaling_factor"
)  # fmt: skip


class LLaDA2Config(QwenConfig, kw_only=True):
    """Upstream's keys and defaults; it reads neither ``norm_topk_prob`` nor ``rotary_dim`` nor ``sliding_window``."""

    MODEL_TYPE = "llada2_moe"
    MASK, STOPS = 156_895, (156_892,)

    intermediate_size: PositiveInt | None = None  # type: ignore[assignment]
    max_position_embeddings: PositiveInt = 16_384
    rms_norm_eps: Positive = 1e-5
    qkv_bias: bool = Field(False, alias="use_qkv_bias")
    o_bias: bool = Field(True, alias="use_bias")
    qk_norm: bool = Field(False, alias="use_qk_norm")
    rotary_factor: Annotated[float, Field(gt=0, le=1)] = Field(0.5, alias="partial_rotary_factor")
    block_length: PositiveInt = 32
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt = 2
    moe_intermediate_size: PositiveInt
    n_group: PositiveInt = 8
    topk_group: PositiveInt = 4
    routed_scaling_factor: Positive = 2.5
    first_k_dense_replace: Count = 0
    num_shared_experts: Count = 0
    expert_bias: bool = Field(True, alias="moe_router_enable_expert_bias")
    norm_head: bool = False
    score_function: Literal["sigmoid"] = "sigmoid"
    router_dtype: Literal["fp32"] = "fp32"
    use_rmsnorm: Literal[True] = True
    norm_softmax: Literal[False] = False
    using_split_qkv_in_self_attention: Literal[False] = False

    def __post_init__(self) -> None:
        tied = self.norm_head and self.tie_embeddings
        require(not tied, "norm_head=true normalises a head of its own, but tie_word_embeddings is true")

    def decoder(self) -> TransformerConfig:
        c = self
        mixture: dict[str, Any] = {name: getattr(c, name) for name in OF_MIXTURE}
        mixture |= {"router": "sigmoid", "expert_bias": c.expert_bias, "norm_topk_prob": c.num_experts_per_tok > 1}
        mixture["shared_intermediate_size"] = c.moe_intermediate_size * c.num_shared_experts
        mixture["sparse_layers"] = tuple(range(c.first_k_dense_replace, c.num_layers))
        size = c.intermediate_size or c.moe_intermediate_size
        return c.transformer(intermediate_size=size, attention="block-causal", mixture=mixture)

    @classmethod
    def weight_names(cls, config: TransformerConfig, stored: Collection[str] = ()) -> Names:
        names: dict[str, str | tuple[Piece, ...]] = {
            "model.word_embeddings.weight": "embed.weight",
            "model.norm.weight": "final_norm.weight",
            "lm_head.weight": "lm_head.weight",
        }
        for i in range(config.num_layers):
            names |= layer_names(config, i)
            names |= feed_forward_names(config, f"model.layers.{i}.mlp", i, stored)
        return names

    @staticmethod
    def finish(model: Transformer, raw: Raw) -> None:
        """With ``norm_head``, give every column of the head, a hidden channel over the vocabulary, unit length.

        That is what SGLang does when it loads such a checkpoint; upstream's own code ignores the key.
        """
        if not raw.get("norm_head"):
            return
        weight = model.lm_head.weight
        if weight.is_meta:
            raise ValueError("norm_head=true normalises the head, so device_map cannot leave lm_head on the disk")
        exact = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad():
            weight.div_(torch.linalg.vector_norm(weight, dim=0, dtype=exact).clamp_min(1e-7))


def layer_names(config: TransformerConfig, layer: int) -> Names:
    """Names of a layer but for its feed-forward part."""
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    q, kv = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, q + 2 * kv)}
    names: dict[str, str | tuple[Piece, ...]] = {
        f"{theirs}.input_layernorm.weight": f"{ours}.attn_norm.weight",
        f"{theirs}.post_attention_layernorm.weight": f"{ours}.mlp_norm.weight",
        f"{theirs}.attention.dense.weight": f"{ours}.o_proj.weight",
    }
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        pieces = tuple(Piece(f"{ours}.{name}.{kind}", rows=part) for name, part in rows.items())
        names[f"{theirs}.attention.query_key_value.{kind}"] = pieces
    if config.o_bias:
        names[f"{theirs}.attention.dense.bias"] = f"{ours}.o_proj.bias"
    if config.qk_norm:
        names[f"{theirs}.attention.query_layernorm.weight"] = f"{ours}.q_norm.weight"
        names[f"{theirs}.attention.key_layernorm.weight"] = f"{ours}.k_norm.weight"
    return names

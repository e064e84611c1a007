"""One bidirectional decoder for every native model family.

LLaDA, Dream and the packaged models differ only in sizes, biases, grouped-query attention and whether
their logits are shifted by one position; a :class:`TransformerConfig` says which, and each family's file maps
its checkpoint names onto the parameter names used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.config import Config, Count, Positive, PositiveInt, require
from unmask.models.base import ModelBase, Positions, real_positions, select_rows, shifted_rows
from unmask.models.kv_cache import KVCache, KVWindow

LayerWindow = tuple[KVWindow, int]
"""The window of a cache that a forward computes, and the layer's number."""

CACHED_ANGLES = 4096
"""Rotary tables are kept for this many positions (4 MB at head_dim 128) and computed anew for longer canvases."""


class TransformerConfig(Config):
    """Shape of a bidirectional decoder.

    ``logits_shift`` is 1 for models whose raw logits at position i predict token i+1 (Dream): the model shifts
    them right so that row i always predicts token i.
    """

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    intermediate_size: PositiveInt
    mask_token_id: Count
    eos_token_id: Count | None
    num_kv_heads: PositiveInt | None = None
    pad_token_id: Count | None = None
    max_position_embeddings: PositiveInt = 4096
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 500_000.0
    qkv_bias: bool = False
    tie_embeddings: bool = False
    logits_shift: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        size, heads, kv_heads = self.hidden_size, self.num_heads, self.kv_heads
        require(size % (2 * heads) == 0, f"hidden_size must be num_heads={heads} times an even number, got {size}")
        require(heads % kv_heads == 0, f"num_heads must be a multiple of num_kv_heads={kv_heads}, got {heads}")
        for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            require((value or 0) < self.vocab_size, f"{name} must be below vocab_size={self.vocab_size}, got {value}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine tables (*positions.shape, head_dim) in float32, half-split pairing as in Llama.

    The first half of the sines is negated, so that a rotation is ``x * cos + roll(x, head_dim / 2) * sin``.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[..., None].float() * frequencies  # (..., head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` (B, T, H, D) by tables (T, 1, D) or (B, T, 1, D), in float32 at least; returns x's dtype."""
    rotated = (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
    return rotated.to(x.dtype)


class Rotary(nn.Module):
    """Rotary tables for the positions of a canvas, computed once per device and always float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, theta: float, max_length: int) -> None:
        super().__init__()
        self.head_dim, self.theta, self.length = head_dim, theta, min(max_length, CACHED_ANGLES)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._fill(self.cos.device)

    def _fill(self, device: torch.device) -> None:
        self.cos, self.sin = rotary_tables(torch.arange(self.length, device=device), self.head_dim, self.theta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # The tables follow .to(device) and .to_empty(), but .to(dtype) must not round them.
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self

    def forward(self, length: int, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tables (T, 1, D) for an unpadded canvas, (B, T, 1, D) for one padded as ``attention_mask`` (B, T) says."""
        if attention_mask is None and length <= self.length:
            return self.cos[:length, None], self.sin[:length, None]
        if attention_mask is None:
            positions = torch.arange(length, device=self.cos.device)
        else:
            positions = real_positions(attention_mask)
        if length <= self.length:
            cos, sin = self.cos[positions], self.sin[positions]
        else:
            cos, sin = rotary_tables(positions, self.head_dim, self.theta)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, both residual."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c, width, kv_width = config, config.hidden_size, config.kv_heads * config.head_dim
        self.num_heads, self.kv_heads, self.head_dim = c.num_heads, c.kv_heads, c.head_dim
        self.attn_norm = nn.RMSNorm(width, eps=c.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=c.rms_norm_eps)
        self.gate_proj = nn.Linear(width, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, width, bias=False)

    def attend(
        self, h: Tensor, cos: Tensor, sin: Tensor, attention_bias: Tensor | None, cached: LayerWindow | None = None
    ) -> Tensor:
        """Attention of the normalised ``h`` (B, W, hidden) before ``o_proj``, heads concatenated to (B, W, hidden).

        Without ``cached`` it attends to ``h``; with it, to the whole cache after storing the keys and values of ``h``.
        """
        batch, length, _ = h.shape
        q = apply_rotary(self.q_proj(h).view(batch, length, self.num_heads, self.head_dim), cos, sin)
        k = apply_rotary(self.k_proj(h).view(batch, length, self.kv_heads, self.head_dim), cos, sin)
        v = self.v_proj(h).view(batch, length, self.kv_heads, self.head_dim)
        if cached is not None:
            window, layer = cached
            k, v = window.update(layer, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = self.kv_heads != self.num_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_bias: Tensor | None,
        rows: Positions = None,
        cached: LayerWindow | None = None,
    ) -> Tensor:
        """``x`` (B, W, hidden); ``attention_bias`` is added to the scores and broadcastable to (B, H, W, T).

        Behind the attention only ``rows`` are computed (see :func:`select_rows`).
        """
        attended = self.attend(self.attn_norm(x), cos, sin, attention_bias, cached)
        x = select_rows(x, rows) + self.o_proj(select_rows(attended, rows))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Transformer(ModelBase):
    """Bidirectional decoder over a canvas of token ids; its logits are aligned: row i predicts token i."""

    supports_cache = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_defaults: dict[str, Any] = {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.max_position_embeddings)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.mask_token_id, self.eos_token_id = config.mask_token_id, config.eos_token_id
        self.pad_token_id, self.vocab_size = config.pad_token_id, config.vocab_size
        self.max_length = config.max_position_embeddings

    def tie_weights(self) -> None:
        """Make the LM head share the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.input_device or self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def attention_bias(self, attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, T) in ``dtype``: 0 at real tokens, the lowest finite value at padding, whose exponential is 0.

        Unlike a bool mask it needs no conversion in every layer, and a row of padding alone stays finite.
        """
        if attention_mask is None:
            return None
        padding = attention_mask.eq(0)[:, None, None, :]
        return torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill_(
            padding, torch.finfo(dtype).min
        )

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Positions = None
    ) -> Tensor:
        """Final normalised hidden states that the LM head turns into the logits of ``positions``: (..., hidden)."""
        shift = self.config.logits_shift
        rows: Positions = shifted_rows(input_ids, attention_mask, positions) if shift else positions
        cos, sin = self.rotary(input_ids.shape[1], attention_mask)
        x = self.embed(input_ids)
        bias = self.attention_bias(attention_mask, x.dtype)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, bias, rows if i == last else None)
        return self.final_norm(x)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Positions = None) -> Tensor:
        """Aligned logits (B, T, V), (B, S, V) or (R, V) of the chosen ``positions``; see :class:`ModelBase`."""
        self.check_inputs(input_ids, attention_mask, positions)
        logits = self.lm_head(self.hidden_states(input_ids, attention_mask, positions))
        return logits.to(input_ids.device)  # of a model split over several devices

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for ``rows`` canvases of ``length`` tokens."""
        c = self.config
        return KVCache.allocate(c.num_layers, rows, length, c.kv_heads, c.head_dim, self.dtype, self.device)

    @property
    def lookback(self) -> int:
        """How far before a token the position lies whose hidden state predicts it: 0 or 1."""
        return self.config.logits_shift

    def forward_cached(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: KVCache,
        wanted: Tensor,
        computed: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Aligned logits (N, S, V) at positions ``wanted`` (N, S) int64, computing only some positions anew.

        Hidden states are computed at positions ``computed`` (N, W) int64, T for an empty place; None: at all. They
        attend to the other positions in ``cache``, and their keys and values are stored there. ``computed`` must
        hold, in any order, the positions that predict ``wanted``: the same ones, and with :attr:`lookback` the real
        ones before them; this is not checked. ``rows`` (N,) int64 are the rows of the cache for ``input_ids`` (N, T);
        None: all in use. Raises TypeError and ValueError as :meth:`forward` does, and for a shape that does not fit.
        """
        self.check_inputs(input_ids, attention_mask, None)
        check_windows(input_ids, cache, wanted, computed, rows)
        batch, length = input_ids.shape
        cos, sin = self.rotary(length, attention_mask)
        tokens = input_ids
        if computed is not None:
            at = computed.clamp_max(length - 1)
            tokens = input_ids.gather(1, at)
            batch_index = torch.arange(batch, device=at.device)[:, None]
            cos, sin = (t[at] if t.ndim == 3 else t[batch_index, at] for t in (cos, sin))
        x = self.embed(tokens)
        bias = self.attention_bias(attention_mask, x.dtype)
        window = KVWindow(cache, rows, computed)
        outputs = self._raw_rows(input_ids, attention_mask, wanted, computed)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, bias, outputs if i == last else None, (window, i))
        return self.lm_head(self.final_norm(x)).to(input_ids.device)

    def _raw_rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, wanted: Tensor, computed: Tensor | None
    ) -> Tensor:
        """(N, S) flat indices, among the computed positions of all rows, of those that predict ``wanted``."""
        batch, length = input_ids.shape
        row = torch.arange(batch, device=wanted.device)[:, None]
        if self.config.logits_shift:
            flat = (wanted + row * length).reshape(-1)
            wanted = shifted_rows(input_ids, attention_mask, flat).view(wanted.shape) - row * length
        if computed is None:
            return wanted + row * length
        width = computed.shape[1]
        place = torch.zeros((batch, length + 1), dtype=torch.int64, device=wanted.device)
        place.scatter_(1, computed, torch.arange(width, device=wanted.device).expand_as(computed))
        return place.gather(1, wanted) + row * width


def check_windows(
    input_ids: Tensor, cache: KVCache, wanted: Tensor, computed: Tensor | None, rows: Tensor | None
) -> None:
    """Refuse windows of a wrong dtype or shape; values are not read."""
    batch, length = input_ids.shape
    for name, index in (("wanted", wanted), ("computed", computed), ("rows", rows)):
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {index.dtype}")
        if index.ndim != (1 if name == "rows" else 2) or index.shape[0] != batch:
            raise ValueError(f"{name} must have one entry per row of input_ids ({batch}), got {tuple(index.shape)}")
    if cache.length != length:
        raise ValueError(f"input_ids have {length} tokens, but the cache is for {cache.length}")
    if rows is None and cache.rows != batch:
        raise ValueError(f"input_ids have {batch} rows, but the cache has {cache.rows} in use; say which with rows")

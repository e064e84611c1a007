"""One decoder for every native model family.

LLaDA, Dream, SDAR and the packaged models differ in sizes, biases, norms, rotary embeddings, what a token attends to
and whether their logits are shifted by one position; a :class:`TransformerConfig` says how, and each family's
file maps its checkpoint names onto the parameter names used here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from unmask.models.base import ModelBase, Positions, check_tensor, real_positions, select_rows, shifted_rows
from unmask.models.experts import Mixture
from unmask.models.kv_cache import KVCache, KVWindow
from unmask.models.rotary import Rotary, Tables, apply_rotary
from unmask.models.transformer_config import TransformerConfig
from unmask.models.watch import Watch

__all__ = ["Block", "Transformer", "TransformerConfig"]

LayerWindow = tuple[KVWindow, int]
"""The window of a cache that a forward computes, and the layer's number."""


class Block(nn.Module):
    """Pre-norm attention and SwiGLU or a mixture of experts, both residual."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        c, width = config, config.hidden_size
        q_width, kv_width = c.num_heads * c.head_dim, c.kv_heads * c.head_dim
        self.num_heads, self.kv_heads, self.head_dim = c.num_heads, c.kv_heads, c.head_dim
        self.attn_norm = nn.RMSNorm(width, eps=c.rms_norm_eps)
        self.q_proj = nn.Linear(width, q_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=c.qkv_bias)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else nn.Identity() for _ in "qk"
        )
        self.o_proj = nn.Linear(q_width, width, bias=c.o_bias)
        self.mlp_norm = nn.RMSNorm(width, eps=c.rms_norm_eps)
        sparse = c.mixture is not None and layer in c.mixture.sparse_layers
        self.mixture = Mixture(width, c.mixture) if c.mixture is not None and sparse else None
        if self.mixture is not None:
            return
        self.gate_proj = nn.Linear(width, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(width, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, width, bias=False)

    def attend(
        self,
        h: Tensor,
        tables: Tables,
        attention_bias: Tensor | None,
        cached: LayerWindow | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Attention of the normalised ``h`` (B, W, hidden) before ``o_proj``, heads concatenated to (B, W, H * D).

        Without ``cached`` it attends to ``h``; with it, to the whole cache after storing the keys and values of ``h``.
        """
        q = self.q_norm(self.q_proj(h).view(*h.shape[:2], self.num_heads, self.head_dim))
        q = apply_rotary(q, tables, query=True)
        k, v = self.keys_values(h, tables, cached)
        if cached is not None:
            q = cached[0].unpack(q)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if watch is not None:
            watch.add(q, k, attention_bias)
        grouped = self.kv_heads != self.num_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias, enable_gqa=grouped)
        out = out.transpose(1, 2).flatten(2)
        return out if cached is None else cached[0].pack(out)

    def keys_values(self, h: Tensor, tables: Tables, cached: LayerWindow | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the normalised ``h`` (B, W, hidden); with ``cached`` stored there: what queries see."""
        shape = (*h.shape[:2], self.kv_heads, self.head_dim)
        k = apply_rotary(self.k_norm(self.k_proj(h).view(shape)), tables)
        v = self.v_proj(h).view(shape)
        return (k, v) if cached is None else cached[0].update(cached[1], k, v)

    def forward(
        self,
        x: Tensor,
        tables: Tables,
        attention_bias: Tensor | None,
        rows: Positions = None,
        cached: LayerWindow | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """``x`` (B, W, hidden); ``attention_bias`` is added to the scores and broadcastable to (B, H, W, T).

        Behind the attention only ``rows`` are computed (see :func:`select_rows`).
        """
        attended = self.attend(self.attn_norm(x), tables, attention_bias, cached, watch)
        x = select_rows(x, rows) + self.o_proj(select_rows(attended, rows))
        h = self.mlp_norm(x)
        if self.mixture is not None:
            return x + self.mixture(h)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Transformer(ModelBase):
    """Decoder over a canvas of token ids; its logits are aligned: row i predicts token i."""

    supports_cache = shows_attention = True
    quantization: str | None = None
    """In which few bits the matrices of the layers are, see :func:`unmask.load_model`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_defaults: dict[str, Any] = {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.rotary_width, config.rope_theta, config.max_position_embeddings, config.yarn)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.final_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.mask_token_id, self.eos_token_id = config.mask_token_id, config.eos_token_id
        self.pad_token_id, self.vocab_size = config.pad_token_id, config.vocab_size
        self.max_length = config.max_position_embeddings
        self.attention, self.block_length, self.sub_block_length = (
            config.attention, config.block_length, config.sub_block_length
        )  # fmt: skip
        self.seeded, self.stop_ids, self.lookback = config.seeded, config.stop_ids, config.logits_shift

    def tie_weights(self) -> None:
        """Make the LM head share the embedding, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As any module's, but quantised weights cannot be trained: ValueError."""
        if requires_grad and self.quantization is not None:
            raise ValueError(f"weights with quantization={self.quantization!r} cannot be trained; load them without")
        return super().requires_grad_(requires_grad)

    @property
    def graph_safe(self) -> bool:
        """Experts without a grouped product wait for the sizes of their groups."""
        return all(module.grouped for module in self.modules() if isinstance(module, Mixture))

    @property
    def embedding(self) -> Tensor:
        return self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.input_device or self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def own_horizon(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """(B, T) int64: the last column that each position sees by the model's own attention; None: all of them.

        In block-causal attention blocks count from a row's first real token. With "bidirectional-prefix" all is prompt.
        """
        if self.attention in ("bidirectional", "bidirectional-prefix"):
            return None
        columns = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if self.attention == "causal-prefix":
            return columns
        at = columns if attention_mask is None else real_positions(attention_mask)
        length = self.block_length or 1
        last = at - at % length + length - 1
        return torch.searchsorted(at.contiguous(), last, right=True) - 1

    def attention_bias(
        self, attention_mask: Tensor | None, dtype: torch.dtype, horizon: Tensor | None = None, length: int = 0
    ) -> Tensor | None:
        """What is added to scores: 0 where a key is seen, else the lowest finite value, whose exponential is 0.

        (B, 1, 1, T) in ``dtype`` for ``attention_mask`` (B, T), and (B, 1, W, T) with ``horizon`` (B, W): a query sees
        the real keys among T = ``length`` up to its horizon. Unlike a bool mask it needs no conversion in every layer,
        and a row that sees nothing stays finite.
        """
        if horizon is not None:
            hidden = torch.arange(length, device=horizon.device) > horizon[:, None, :, None]
            if attention_mask is not None:
                hidden = hidden | attention_mask.eq(0)[:, None, None, :]
        elif attention_mask is not None:
            hidden = attention_mask.eq(0)[:, None, None, :]
        else:
            return None
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Positions = None,
        horizon: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Final normalised hidden states that the LM head turns into the logits of ``positions``: (..., hidden)."""
        shift = self.config.logits_shift
        rows: Positions = shifted_rows(input_ids, attention_mask, positions) if shift else positions
        tables = self.rotary(input_ids.shape[1], attention_mask)
        x = self.embed(input_ids)
        horizon = self.own_horizon(input_ids, attention_mask) if horizon is None else horizon
        bias = self.attention_bias(attention_mask, x.dtype, horizon, input_ids.shape[1])
        last, watched = len(self.layers) - 1, len(self.layers)
        if watch is not None:
            watch.queries, watched = self.predicting(input_ids, attention_mask, watch.positions), watched - watch.layers
        for i, layer in enumerate(self.layers):
            x = layer(x, tables, bias, rows if i == last else None, watch=watch if i >= watched else None)
        return self.final_norm(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Positions = None,
        horizon: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Aligned logits (B, T, V), (B, S, V) or (R, V) of the chosen ``positions``; see :class:`ModelBase`.

        ``watch`` collects what the predictions of its positions attend to.
        """
        self.check_inputs(input_ids, attention_mask, positions, horizon)
        logits = self.lm_head(self.hidden_states(input_ids, attention_mask, positions, horizon, watch))
        return logits.to(input_ids.device)  # of a model split over several devices

    def new_cache(self, rows: int, length: int) -> KVCache:
        """An empty cache for ``rows`` canvases of ``length`` tokens."""
        return KVCache.allocate(self.config, rows, length, self.dtype, self.device)

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
        wanted = self.predicting(input_ids, attention_mask, wanted)
        logits = self.forward_window(input_ids, attention_mask, KVWindow(cache, computed, rows), wanted)
        assert logits is not None
        return logits

    def predicting(self, input_ids: Tensor, attention_mask: Tensor | None, wanted: Tensor) -> Tensor:
        """(N, S) int64: the canvas positions whose raw rows predict the tokens at ``wanted`` (N, S)."""
        if not self.config.logits_shift:
            return wanted
        first = torch.arange(len(wanted), device=wanted.device)[:, None] * input_ids.shape[1]
        return shifted_rows(input_ids, attention_mask, (wanted + first).reshape(-1)).view(wanted.shape) - first

    def forward_window(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        window: KVWindow,
        outputs: Tensor | None,
        horizon: Tensor | None = None,
    ) -> Tensor | None:
        """Raw logits (N, S, V) of the positions ``outputs`` (N, S); computes and stores what ``window`` says.

        ``horizon`` (N, W) int64: the last position that each computed one sees; None: every one below the window's
        limit. Without ``outputs`` nothing but keys and values is computed, and the result is None.
        """
        length = input_ids.shape[1]
        tables = self.rotary(length, attention_mask)
        tokens = input_ids
        if window.computed is not None:
            at = window.computed.clamp_max(length - 1)
            tokens = input_ids.gather(1, at)
            each = torch.arange(len(at), device=at.device)[:, None]
            tables = tuple(window.pack(t[at] if t.ndim == 3 else t[each, at]) for t in tables)
        real = attention_mask if attention_mask is None else attention_mask[:, : window.limit]
        bias = self.attention_bias(real, self.dtype, horizon, window.limit)
        x = self.embed(window.pack(tokens))
        rows = None if outputs is None else computed_rows(window, outputs, length)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if i == last and rows is None:
                assert isinstance(layer, Block)
                layer.keys_values(layer.attn_norm(x), tables, (window, i))
                return None
            x = layer(x, tables, bias, rows if i == last else None, (window, i))
        return self.lm_head(self.final_norm(x)).to(input_ids.device)


def computed_rows(window: KVWindow, outputs: Tensor, length: int) -> Tensor:
    """(N, S): where positions ``outputs`` (N, S) are among all that the window computes, counted through the rows."""
    batch = len(outputs)
    if window.computed is None:
        return outputs + torch.arange(batch, device=outputs.device)[:, None] * length
    place = torch.zeros((batch, length + 1), dtype=torch.int64, device=outputs.device)
    place.scatter_(1, window.computed, window.numbers(window.computed.shape))
    return place.gather(1, outputs)


def check_windows(
    input_ids: Tensor, cache: KVCache, wanted: Tensor, computed: Tensor | None, rows: Tensor | None
) -> None:
    """Refuse windows of a wrong dtype or shape; values are not read."""
    batch, length = input_ids.shape
    for name, index, shape in (
        ("wanted", wanted, (batch, None)),
        ("computed", computed, (batch, None)),
        ("rows", rows, (batch,)),
    ):
        if index is not None:
            check_tensor(name, index, shape, index.device)
    if cache.length != length:
        raise ValueError(f"input_ids have {length} tokens, but the cache is for {cache.length}")
    if rows is None and cache.rows != batch:
        raise ValueError(f"input_ids have {batch} rows, but the cache has {cache.rows} in use; say which with rows")

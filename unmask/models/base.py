"""What every model offers to the rest of the project, and the row arithmetic the models share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Positions = slice | Tensor | None
"""Rows of logits to compute: None for all, a slice over T, or int64 flat indices b * T + i."""


class ModelBase(nn.Module):
    """A masked diffusion language model: a canvas of token ids in, aligned logits out.

    *Aligned* means that row i of the logits predicts token i, whatever the checkpoint's own convention. A forward
    never synchronises with the host and has no data-dependent shapes, so that it can be compiled and captured.
    """

    mask_token_id: int
    """The id of a position that is still to be filled."""
    eos_token_id: int | None
    """The first of :attr:`stop_ids`; None if there is none."""
    stop_ids: tuple[int, ...] = ()
    """Every id that ends a completion."""
    pad_token_id: int | None
    """What left padding is filled with; None if the checkpoint names none."""
    vocab_size: int
    """V, the width of the logits."""
    max_length: int | None
    """The longest canvas in tokens, None if unlimited."""
    generation_defaults: dict[str, Any]
    """Sampler settings the checkpoint asks for (such as ``block_length``); empty if it asks for none."""
    input_device: torch.device | None = None
    """Where inputs belong and logits come out, for a model split over several devices."""
    attention: Literal["bidirectional", "block-causal", "causal-prefix", "bidirectional-prefix"] = "bidirectional"
    """How tokens see each other: "bidirectional"; "block-causal" (their own block and those before, in a grid from the
    row's first token); "causal-prefix" (committed tokens are causal, the active block sees itself);
    "bidirectional-prefix" (block-causal, where the prompt is one block)."""
    block_length: int | None = None
    """The block length of a block-causal model's training, if known."""
    canvas_length: int | None = None
    """Tokens of a canvas that begins at random and has no masks, see :mod:`unmask.models.diffusion_gemma`; None: masks
    are filled."""
    sub_block_length: int | None = None
    """Blocks are decoded in parts of this many tokens; None: whole."""
    seeded: bool = False
    """Whether the first token of a block is what the raw row before it predicts."""
    lookback: int = 0
    """How far before a token the raw row lies that predicts it."""
    supports_cache: bool = False
    """Whether it can keep keys and values: ``new_cache`` and ``forward_cached``, as :class:`Transformer` has them."""

    shows_attention: bool = False
    """Whether ``forward`` takes a :class:`unmask.models.watch.Watch`, as :class:`Transformer` does."""

    @property
    def graph_safe(self) -> bool:
        """Whether a forward never waits for the host, so that a CUDA graph can capture it."""
        return True

    @property
    def embedding(self) -> Tensor | None:
        """(V, H): the token embedding, which some policies read; None if there is none to be had."""
        return None

    @property
    def device(self) -> torch.device:
        return self.input_device or next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Positions = None,
        horizon: Tensor | None = None,
    ) -> Tensor:
        """Aligned logits in the model's dtype.

        ``input_ids`` (B, T) int64, every id in [0, vocab_size): this is not checked, as it would synchronise.
        ``attention_mask`` (B, T) bool or integer, nonzero where a token is real; a padded row gets at its real
        positions the logits it would get alone. ``positions`` says which rows the LM head computes: None gives
        (B, T, V), a slice over T gives (B, S, V), an int64 tensor of flat indices b * T + i gives (R, V).
        ``horizon`` (B, T) int64: position i of a row sees the real tokens at columns j <= horizon[i]; None: what
        :attr:`attention` says of a whole canvas, where causal-prefix is causal.

        Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device, or a canvas longer than
        ``max_length``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward")

    def check_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, positions: Positions, horizon: Tensor | None = None
    ) -> None:
        """Refuse malformed inputs by their types, shapes, dtypes and devices; values are not read."""
        check_tensor("input_ids", input_ids, (None, None), self.device)
        if input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must have shape (B, T) with T >= 1, got {tuple(input_ids.shape)}")
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} tokens, more than the model's context of {self.max_length}"
            )
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, input_ids.shape, input_ids.device, any_integer=True)
        if positions is not None and not isinstance(positions, slice):
            check_tensor("positions", positions, (None,), input_ids.device)
        if horizon is not None:
            check_tensor("horizon", horizon, input_ids.shape, input_ids.device)


def check_tensor(
    name: str, value: Any, shape: Sequence[int | None], device: torch.device, any_integer: bool = False
) -> None:
    """Raise TypeError or ValueError naming ``name`` unless ``value`` is an int64 tensor of ``shape`` on ``device``.

    ``shape`` has None for any size. With ``any_integer`` bool and other integers will do.
    """
    wanted = "bool or integer" if any_integer else "torch.int64"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a {wanted} tensor, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or not (any_integer or value.dtype == torch.int64):
        raise TypeError(f"{name} must be {wanted}, got {value.dtype}")
    if value.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, value.shape, strict=True)):
        sizes = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape ({sizes}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def real_positions(attention_mask: Tensor) -> Tensor:
    """(B, T) int64: the index of each token among its row's real tokens, so that padding shifts no position.

    Padding before the first real token gets 0; ``attention_mask`` (B, T) is nonzero where a token is real.
    """
    return (attention_mask.ne(0).cumsum(dim=1) - 1).clamp_min(0)


def select_rows(x: Tensor, rows: Positions) -> Tensor:
    """The chosen rows of ``x`` (B, T, H): (B, S, H) for a slice, rows.shape + (H,) for a tensor of flat indices."""
    if rows is None:
        return x
    if isinstance(rows, slice):
        return x[:, rows]
    return x.flatten(0, 1)[rows]


def shifted_rows(input_ids: Tensor, attention_mask: Tensor | None, positions: Positions) -> Tensor:
    """Flat indices of the raw rows that predict ``positions``, for a model whose raw row i predicts token i + 1.

    Token i is predicted by the raw row of the real token before it. A row's first real token uses its own raw row
    (upstream uses row 0, so that a left-padded prompt differs from the same prompt alone). The shape is (B, T),
    (B, S) or (R,) as ``positions`` says.
    """
    batch, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device).expand(batch, length)
    if attention_mask is None:
        source = (index - 1).clamp_min(0)
    else:
        latest = torch.where(attention_mask.ne(0), index, -1).cummax(dim=1).values  # latest real token up to i
        before = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
        source = torch.where(before >= 0, before, index)
    flat = source + torch.arange(batch, device=input_ids.device)[:, None] * length
    if isinstance(positions, slice):
        return flat[:, positions]
    return flat if positions is None else flat.flatten()[positions]

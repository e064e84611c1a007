"""What a :class:`unmask.models.Transformer` is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unmask.config import Config, Count, Positive, PositiveInt, require
from unmask.models.experts import MixtureConfig
from unmask.models.rotary import Yarn

Attention = Literal["bidirectional", "block-causal", "causal-prefix", "bidirectional-prefix"]


def nested(kind: type[Config]) -> BeforeValidator:
    """Lets a field of a configuration's type also take a mapping, as JSON has it."""
    return BeforeValidator(lambda value: kind.from_dict(value) if isinstance(value, dict) else value)


class TransformerConfig(Config):
    """Shape of a decoder, and how it was trained to be decoded.

    ``logits_shift`` is 1 for models whose raw logits at position i predict token i+1 (Dream): the model shifts
    them right so that row i always predicts token i. ``attention``, ``block_length``, ``sub_block_length``,
    ``seeded`` and ``stop_ids`` are those of :class:`unmask.models.ModelBase`.
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
    head_dim: Count = 0
    """Channels of a head; 0: hidden_size / num_heads."""
    o_bias: bool = False
    qk_norm: bool = False
    """Whether queries and keys are normalised per head before they are rotated."""
    rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The first int(head_dim * rotary_factor) channels of a head are rotated."""
    yarn: Annotated[Yarn | None, nested(Yarn)] = None
    mixture: Annotated[MixtureConfig | None, nested(MixtureConfig)] = None
    attention: Attention = "bidirectional"
    block_length: PositiveInt | None = None
    sub_block_length: PositiveInt | None = None
    seeded: bool = False
    stop_ids: tuple[Count, ...] = ()
    """Every id that ends a completion; ``eos_token_id`` is put in front."""

    def __post_init__(self) -> None:
        size, heads, kv_heads = self.hidden_size, self.num_heads, self.kv_heads
        if self.head_dim == 0:
            require(size % (2 * heads) == 0, f"hidden_size must be num_heads={heads} times an even number, got {size}")
            object.__setattr__(self, "head_dim", size // heads)
        width = self.rotary_width
        turned = f"head_dim={self.head_dim} * rotary_factor={self.rotary_factor}"
        require(width > 0 and width % 2 == 0, f"{turned} must be an even number of channels, got {width}")
        require(heads % kv_heads == 0, f"num_heads must be a multiple of num_kv_heads={kv_heads}, got {heads}")
        sparse = max(self.mixture.sparse_layers, default=0) if self.mixture else 0
        require(sparse < self.num_layers, f"sparse_layers must be below num_layers={self.num_layers}, got {sparse}")
        stops = (() if self.eos_token_id is None else (self.eos_token_id,)) + self.stop_ids
        object.__setattr__(self, "stop_ids", tuple(dict.fromkeys(stops)))
        object.__setattr__(self, "eos_token_id", next(iter(stops), None))
        mask = self.mask_token_id
        require(mask not in stops, f"mask_token_id must not be an end of sequence, got {mask}, which ends one")
        ids: dict[str, Any] = {name: getattr(self, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
        for name, value in (*ids.items(), *(("stop_ids", value) for value in self.stop_ids)):
            require((value or 0) < self.vocab_size, f"{name} must be below vocab_size={self.vocab_size}, got {value}")
        block, sub = self.block_length, self.sub_block_length
        blocks = self.attention != "bidirectional"
        require(blocks or block is None, f"block_length is for attention by blocks, got {block} and bidirectional")
        require(block is not None or self.attention != "block-causal", "block-causal attention needs a block_length")
        fits = sub is None or (block or 1) % sub == 0
        require(fits, f"block_length must be a multiple of sub_block_length={sub}, got {block}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def rotary_width(self) -> int:
        """How many channels of a head are rotated."""
        return int(self.head_dim * self.rotary_factor)

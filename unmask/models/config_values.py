"""Reading a checkpoint's config.json: a class for each family declares the keys and their types."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from unmask.config import Config, Count, Positive, PositiveInt, checked
from unmask.models.pieces import Names
from unmask.models.rotary import Yarn
from unmask.models.transformer_config import TransformerConfig

Raw = Mapping[str, Any]
"""A parsed config.json."""

TokenId = Annotated[Count | None, BeforeValidator(lambda value: value[0] if isinstance(value, tuple) else value)]
"""A token id, the first if a list is given."""

TokenIds = Count | tuple[Count, ...] | None
"""A token id, several, or none."""

BLOCK_KEYS = ("block_length", "block_size", "bd_size")
"""Keys under which checkpoints give their block size."""

NOT_YARN = ("rope_type", "type", "rope_theta")


def unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    if kind_of(rope) != "default" or set(rope) - {"rope_type", "type", "rope_theta"}:
        raise ValueError("unscaled rotary embeddings")
    return rope


def scaled(rope: dict[str, Any]) -> dict[str, Any]:
    return rope if kind_of(rope) == "yarn" else unscaled(rope)


def kind_of(rope: Raw) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


Rope = Annotated[dict[str, Any], AfterValidator(unscaled)]
Scaled = Annotated[dict[str, Any], AfterValidator(scaled)]
"""Rotary embeddings unscaled or with YaRN."""


class CheckpointConfig(Config, kw_only=True):
    """The keys of a family's config.json. Fields have :class:`TransformerConfig`'s names, the key as an alias.

    A field whose type has a single value is a switch of which this decoder implements only that setting.
    """

    MODEL_TYPE: ClassVar[str]
    MASK: ClassVar[int | None] = None
    """The family's mask token, for checkpoints that name none."""
    STOPS: ClassVar[tuple[int, ...]] = ()
    """The family's ends of sequence, for checkpoints that name none."""

    vocab_size: PositiveInt
    mask_token_id: Count
    eos_token_id: TokenId = None
    stop_ids: tuple[Count, ...] = ()
    pad_token_id: TokenId = None
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive | None = None
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    rotary_factor: Annotated[float, Field(ge=1, le=1)] = Field(1.0, alias="partial_rotary_factor")

    @classmethod
    def read_config(cls, raw: Raw) -> TransformerConfig:
        """The decoder's configuration. ValueError names a key with a value that this decoder does not implement."""
        return read(cls, raw).decoder()

    @classmethod
    def weight_names(cls, config: TransformerConfig, stored: Collection[str] = ()) -> Names:
        """Names in the checkpoint -> what each is of :class:`unmask.models.Transformer`'s parameters."""
        raise NotImplementedError

    def decoder(self) -> TransformerConfig:
        """What :meth:`read_config` returns."""
        return self.transformer()

    def transformer(self, **settings: Any) -> TransformerConfig:
        """The decoder's configuration; ``settings`` replace or add fields."""
        own = {f.name: getattr(self, f.name) for f in fields(TransformerConfig) if hasattr(self, f.name)}
        own = {name: value for name, value in own.items() if value is not None or name == "eos_token_id"}
        rope = self.rope_parameters or self.rope_scaling or {}
        own["rope_theta"] = self.rope_theta or rope.get("rope_theta", 10_000.0)
        if kind_of(rope) == "yarn":
            own["yarn"] = self.read_yarn(rope)
        return TransformerConfig(**{**own, **settings})

    def read_yarn(self, rope: dict[str, Any]) -> Yarn:
        """What ``rope`` says, with the whole context for a missing original one, as transformers reads it."""
        context = getattr(self, "max_position_embeddings", None)
        given = {name: value for name, value in rope.items() if name not in NOT_YARN and value is not None}
        given.setdefault("original_max_position_embeddings", context)
        try:
            if "factor" not in given and context:
                given["factor"] = context / given["original_max_position_embeddings"]
            return Yarn.from_dict(given)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"config.json: rotary embeddings {rope}: {error}") from None


Kind = TypeVar("Kind", bound=CheckpointConfig)


def read(kind: type[Kind], raw: Raw) -> Kind:
    """The keys of ``raw`` that ``kind`` has; null counts as missing. ValueError names a key with another value."""
    keys = [f.alias or name for name, f in kind.__pydantic_fields__.items()]
    values = {key: raw[key] for key in keys if raw.get(key) is not None}
    try:
        vocabulary = checked("vocab_size", raw.get("vocab_size"), PositiveInt) if "vocab_size" in values else 0
        if "mask_token_id" not in values:
            values["mask_token_id"] = default_mask(kind, vocabulary)
        if "eos_token_id" not in values and not values.get("stop_ids"):
            values["stop_ids"] = tuple(i for i in kind.STOPS if i < vocabulary)
        if "block_length" in keys and (length := block_length(raw)):
            values["block_length"] = length
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def default_mask(kind: type[CheckpointConfig], vocabulary: int) -> int:
    """The family's mask token, which ValueError asks for if there is none in the vocabulary."""
    if kind.MASK is not None and (vocabulary > kind.MASK or not vocabulary):
        return kind.MASK
    known = "" if kind.MASK is None else f", and the family's {kind.MASK} lies outside the {vocabulary} tokens"
    raise ValueError(f"no mask_token_id is given{known}; give it as load_model(..., mask_token_id=...)")


def block_length(raw: Raw) -> int | None:
    """The block size that a config.json gives under any of its names; ValueError if it gives two."""
    said = {key: checked(key, raw[key], PositiveInt) for key in BLOCK_KEYS if raw.get(key) is not None}
    if len(set(said.values())) > 1:
        raise ValueError(f"one block size is expected, got {said}; give load_model(..., block_length=...)")
    return next(iter(said.values()), None)


def ids_of(name: str, *values: Any) -> tuple[int, ...]:
    """The distinct ids that ``values`` give, each an id, a list of them, or None; ValueError names another value."""

    def each() -> Iterable[int]:
        for value in values:
            ids = checked(name, value, TokenIds)
            yield from ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    return tuple(dict.fromkeys(each()))

"""How stored tensors make up a decoder's parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from unmask.models.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Piece:
    """Part of a parameter: expert number ``expert`` of a stack, or what the ``rows`` of a stored tensor are."""

    parameter: str
    expert: int | None = None
    rows: slice | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a stored tensor that ends with this piece must have, of a parameter's ``shape``."""
        if self.expert is not None:
            return shape[1:]
        return shape if self.rows is None else (self.rows.stop, *shape[1:])

    def of(self, stored: Tensor) -> Tensor:
        """The piece itself."""
        return stored if self.rows is None else stored[self.rows]

    def copy(self, stored: Tensor, parameter: Tensor) -> None:
        """Write the piece into ``parameter``."""
        target = parameter if self.expert is None else parameter[self.expert]
        target.copy_(self.of(stored))


Names = Mapping[str, str | tuple[Piece, ...]]
"""A checkpoint's names -> the parameter that each is, or the pieces it holds."""


def pieces_of(ours: str | tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces of a tensor that is a whole parameter, or of several."""
    return (Piece(ours),) if isinstance(ours, str) else ours


def feed_forward_names(config: TransformerConfig, theirs: str, layer: int, stored: Collection[str]) -> Names:
    """Names of a layer's feed-forward part; experts are fused, or one by one, as they are in ``stored``."""
    projections, mixture = ("gate_proj", "up_proj", "down_proj"), config.mixture
    if mixture is None or layer not in mixture.sparse_layers:
        return {f"{theirs}.{x}.weight": f"layers.{layer}.{x}.weight" for x in projections}
    ours = f"layers.{layer}.mixture"
    names: dict[str, str | tuple[Piece, ...]] = {f"{theirs}.gate.weight": f"{ours}.router.weight"}
    if mixture.expert_bias:
        names[f"{theirs}.gate.expert_bias"] = f"{ours}.router.expert_bias"
    if mixture.shared_intermediate_size:
        names |= {f"{theirs}.shared_experts.{x}.weight": f"{ours}.shared.{x}.weight" for x in projections}
    for x in projections:
        if f"{theirs}.experts.{x}" in stored:
            names[f"{theirs}.experts.{x}"] = f"{ours}.{x}"
            continue
        for i in range(mixture.num_experts):
            names[f"{theirs}.experts.{i}.{x}.weight"] = (Piece(f"{ours}.{x}", expert=i),)
    return names

"""Small models the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from unmask.models import Transformer, TransformerConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 24, "num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "intermediate_size": 20,
    "mask_token_id": 36, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def build() -> Callable[..., Transformer]:
    """Make a random decoder; keywords replace fields of its config."""

    def make(seed: int = 0, **changes: Any) -> Transformer:
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(**{**SHAPE, **changes}))
        for name, p in model.named_parameters():
            torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
        return model.eval().requires_grad_(False)

    return make

"""Small models for sampler tests."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.models import Transformer, TransformerConfig

VOCAB, MASK, EOS = 23, 22, 21


def random_model(seed: int = 0, hidden: int = 32, sharpness: float = 6.0) -> Transformer:
    """A small random decoder whose predictions are neither flat nor certain."""
    torch.manual_seed(seed)
    model = Transformer(
        TransformerConfig(
            vocab_size=VOCAB, hidden_size=hidden, num_layers=2, num_heads=2, intermediate_size=48, mask_token_id=MASK,
            eos_token_id=EOS, pad_token_id=0, max_position_embeddings=128,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.normal_(std=sharpness / hidden**0.5)
        for p in model.layers.parameters():
            if p.ndim == 2:
                p.normal_(std=2.0 / p.shape[1] ** 0.5)
    return model.eval()


class ScriptedModel:
    """Returns given logits (L, V) for the buffer of every row, whatever the canvas holds; counts its calls."""

    mask_token_id, eos_token_id, vocab_size, pad_token_id = MASK, EOS, VOCAB, 0
    device, dtype, max_length = torch.device("cpu"), torch.float32, 1000

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.calls = logits, 0

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: object = None) -> Tensor:
        self.calls += 1
        rows, width = input_ids.shape
        full = torch.zeros(rows, width, VOCAB)
        full[:, width - self.logits.shape[0] :] = self.logits
        if isinstance(positions, slice):
            return full[:, positions]
        return full if positions is None else full.reshape(-1, VOCAB)[positions]

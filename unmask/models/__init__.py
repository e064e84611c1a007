"""Masked diffusion language models: one interface, one native decoder, and how to load them."""

from unmask.models.base import ModelBase
from unmask.models.loading import load_model, load_tokenizer, packaged_models, save_model
from unmask.models.tokenizer import CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer, TransformerConfig

__all__ = [
    "CharTokenizer", "ModelBase", "Transformer", "TransformerConfig", "WordTokenizer", "load_model", "load_tokenizer",
    "packaged_models", "save_model",
]  # fmt: skip

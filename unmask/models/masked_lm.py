"""Masked language models of transformers (BERT, RoBERTa, ModernBERT, ...), and models that bring their own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.config import checked
from unmask.models.base import ModelBase, Positions, real_positions, select_rows, shifted_rows
from unmask.models.config_values import TokenId
from unmask.models.placement import indexed

HEADS = {
    "bert": ("cls",),
    "modernbert": ("head", "decoder"),
    "roberta": ("lm_head",),
    "camembert": ("lm_head",),
    "xlm-roberta": ("lm_head",),
}
"""The modules of the head, in order, for the model types where they are known."""

REMOTE_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


class MaskedLM(ModelBase):
    """Wraps a transformers model whose forward returns ``logits``.

    Where the head can be called by itself (:data:`HEADS`), it computes only the chosen rows; elsewhere all rows are
    computed and the chosen ones returned. Some mask code of transformers synchronises with the host.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_token_id: int,
        eos_token_id: int | None,
        pad_token_id: int | None = None,
        logits_shift: int = 0,
    ) -> None:
        """``logits_shift`` is 1 if raw logits at position i predict token i + 1. Raises ValueError for bad ids."""
        super().__init__()
        config: Any = model.config
        self.model = model
        self.generation_defaults = {}
        self.vocab_size = int(config.vocab_size)
        ids = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        for name, value in ids.items():
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name}={value} is outside the vocabulary of {self.vocab_size} tokens")
        self.mask_token_id, self.eos_token_id, self.pad_token_id = mask_token_id, eos_token_id, pad_token_id
        self.logits_shift = logits_shift
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        backbone = getattr(model, self.prefix, None)
        embeddings: Any = getattr(backbone, "embeddings", None)
        # RoBERTa's learned positions start behind its padding id.
        from_padding = hasattr(embeddings, "create_position_ids_from_input_ids")
        self.first_position = int(embeddings.padding_idx) + 1 if from_padding else 0
        context = getattr(config, "max_position_embeddings", None)
        self.max_length = None if context is None or context < 1 else int(context) - self.first_position
        self.head_names = HEADS.get(getattr(config, "model_type", ""), ()) if isinstance(backbone, nn.Module) else ()
        if not all(hasattr(model, name) for name in self.head_names):
            self.head_names = ()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Positions = None) -> Tensor:
        """Aligned logits (B, T, V), (B, S, V) or (R, V) of the chosen ``positions``; see :class:`ModelBase`.

        Raises ValueError also for an ``attention_mask`` given to a model that takes no position ids, since padding
        would shift the positions of the real tokens.
        """
        self.check_inputs(input_ids, attention_mask, positions)
        rows: Positions = shifted_rows(input_ids, attention_mask, positions) if self.logits_shift else positions
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:
            arguments["position_ids"] = self._position_ids(input_ids, attention_mask)
        elif attention_mask is not None:
            raise ValueError(
                f"{type(self.model).__name__} takes no position_ids, so padded batches would shift its positions; "
                "give it rows of one length and no attention_mask"
            )
        if not self.head_names:
            return select_rows(self.model(**arguments).logits.to(input_ids.device), rows)
        backbone = getattr(self.model, self.prefix)
        x = select_rows(backbone(**arguments)[0].to(input_ids.device), rows)
        for name in self.head_names:
            x = getattr(self.model, name)(x)
        return x.to(input_ids.device)

    def _position_ids(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(1, T) or (B, T) int64, counting real tokens only."""
        if attention_mask is not None:
            return real_positions(attention_mask) + self.first_position
        length = input_ids.shape[1]
        return torch.arange(self.first_position, self.first_position + length, device=input_ids.device)[None]


def supported_types() -> set[str]:
    """Model types with a masked language model in transformers. Raises ImportError without transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def load_masked_lm(
    folder: Path,
    raw: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    load_tokenizer: Callable[[], Any],
    overrides: Mapping[str, int],
    trust_remote_code: bool = False,
    logits_shift: int = 0,
    device_map: Any = None,
) -> MaskedLM:
    """Load with transformers from ``folder``, whose config.json is ``raw``; only safetensors are read.

    Token ids come from ``overrides``, else the tokenizer (end of sequence falls back to
    the separator), else the config. With ``trust_remote_code`` the folder's own model class is used.
    Raises ValueError if no mask token is found.
    """
    import transformers

    auto: Any = transformers.AutoModelForMaskedLM
    if trust_remote_code and (own := [name for name in REMOTE_CLASSES if name in raw.get("auto_map", {})]):
        auto = getattr(transformers, own[0])
    ids = token_ids(raw, load_tokenizer, overrides)
    if ids["mask_token_id"] is None:
        raise ValueError(
            f"neither the tokenizer nor the config in {folder} names a mask token; "
            "give load_model(..., mask_token_id=...)"
        )
    model = auto.from_pretrained(
        folder,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        device_map=device_map,
    )
    if device_map is None:
        model.to(device)
    wrapped = MaskedLM(model, **ids, logits_shift=logits_shift)  # type: ignore[arg-type]
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        wrapped.input_device = first_device(devices)
    return wrapped.requires_grad_(False).eval()


def first_device(devices: Iterable[Any]) -> torch.device:
    """Where a model split by transformers takes its inputs: the first device that is not the CPU, else the CPU."""
    found = sorted((indexed(torch.device(d)) for d in devices if d != "disk"), key=str)
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def token_ids(
    raw: Mapping[str, Any], load_tokenizer: Callable[[], Any], overrides: Mapping[str, int]
) -> dict[str, int | None]:
    """Mask, end-of-sequence and padding ids: from ``overrides``, the tokenizer, then the config."""
    try:
        tokenizer = load_tokenizer()
    except (OSError, ValueError, KeyError):  # a checkpoint without a tokenizer, or one transformers cannot build
        tokenizer = None
    found: dict[str, int | None] = {}
    for name, keys in (
        ("mask_token_id", ("mask_token_id",)),
        ("eos_token_id", ("eos_token_id", "sep_token_id")),
        ("pad_token_id", ("pad_token_id",)),
    ):
        known = [overrides.get(name), *(getattr(tokenizer, k, None) for k in keys)]
        known += [checked(f"config.json: {key}", raw.get(key), TokenId) for key in keys]
        found[name] = next((int(value) for value in known if value is not None), None)
    return found

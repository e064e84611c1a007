"""Masked language models of transformers (BERT, RoBERTa, ModernBERT, ...), and models that bring their own code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unmask.config import checked
from unmask.models.base import ModelBase, Positions, real_positions, select_rows, shifted_rows
from unmask.models.config_values import TokenId
from unmask.models.placement import indexed
from unmask.models.weights import BUFFERS, DTYPES, Stored, find_shards, read_headers, read_tensors, some

HEADS = {
    "bert": ("cls",),
    "modernbert": ("head", "decoder"),
    "roberta": ("lm_head",),
    "camembert": ("lm_head",),
    "xlm-roberta": ("lm_head",),
}
"""The modules of the head, in order, for the model types where they are known."""

PROBED: WeakKeyDictionary[nn.Module, tuple[int | None, bool]] = WeakKeyDictionary()
"""What is known of models about their position ids and padding; see :meth:`MaskedLM._probed`."""

UNUSED = re.compile(rf"{BUFFERS.pattern}|(^|\.)(pooler|seq_relationship|sop_classifier|contact_head)\.")
"""Tensors of checkpoints that predicting tokens has no use for."""

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
        stop_ids: tuple[int, ...] = (),
    ) -> None:
        """``logits_shift`` is 1 if raw logits at position i predict token i + 1; ``stop_ids`` also end a completion.

        Stop ids outside the vocabulary are left out, other ids raise ValueError there.
        """
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
        stops = (() if eos_token_id is None else (eos_token_id,)) + stop_ids
        self.stop_ids = tuple(dict.fromkeys(i for i in stops if i < self.vocab_size))
        if mask_token_id in self.stop_ids:
            raise ValueError(f"mask_token_id={mask_token_id} must not be an end of sequence; these are {stops}")
        self.logits_shift = logits_shift
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        backbone = getattr(model, self.prefix, None)
        context = getattr(config, "max_position_embeddings", None)
        table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
        # Some tables have further rows for what comes before the first position.
        rows = getattr(table, "num_embeddings", context) if context is not None and context > 0 else None
        self.max_length = rows
        self.first_position, self.takes_padding = self._probed()
        self.max_length = None if rows is None else int(rows) - (self.first_position or 0)
        self.head_names = HEADS.get(getattr(config, "model_type", ""), ()) if isinstance(backbone, nn.Module) else ()
        if not all(hasattr(model, name) for name in self.head_names):
            self.head_names = ()

    @property
    def embedding(self) -> Tensor | None:
        find: Any = getattr(self.model, "get_input_embeddings", None)
        return None if find is None else find().weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Positions = None,
        horizon: Tensor | None = None,
    ) -> Tensor:
        """Aligned logits (B, T, V), (B, S, V) or (R, V) of the chosen ``positions``; see :class:`ModelBase`.

        Raises ValueError also for a ``horizon``, and for an ``attention_mask`` given to a model whose real tokens
        padding would change.
        """
        if horizon is not None:
            raise ValueError("horizon is for native models; a model of transformers sees its whole canvas")
        self.check_inputs(input_ids, attention_mask, positions)
        rows: Positions = shifted_rows(input_ids, attention_mask, positions) if self.logits_shift else positions
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if attention_mask is not None and not self.takes_padding:
            raise ValueError(
                f"padding changes what {type(self.model).__name__} computes for real tokens; give it rows of one "
                "length and no attention_mask, or run rows one at a time (deterministic=True)"
            )
        if self.first_position is not None:
            arguments["position_ids"] = self._position_ids(input_ids, attention_mask, self.first_position)
        if not self.head_names:
            return select_rows(self.model(**arguments).logits.to(input_ids.device), rows)
        backbone = getattr(self.model, self.prefix)
        x = select_rows(backbone(**arguments)[0].to(input_ids.device), rows)
        for name in self.head_names:
            x = getattr(self.model, name)(x)
        return x.to(input_ids.device)

    def _position_ids(self, input_ids: Tensor, attention_mask: Tensor | None, first: int) -> Tensor:
        """(1, T) or (B, T) int64, counting real tokens only, from ``first`` on."""
        if attention_mask is not None:
            return real_positions(attention_mask) + first
        return torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]

    @torch.no_grad()
    def _probed(self) -> tuple[int | None, bool]:
        """The position id of a first token, None if the model takes none, and whether it keeps padding apart.

        Both are tried on a few tokens. Positions count from 0, from 2, or from behind the padding id (RoBERTa). What
        stands under padding must not change a bit of the real tokens' logits, and that it is there only the rounding.
        """
        model: Any = self.model
        if "position_ids" not in inspect.signature(model.forward).parameters:
            return None, False
        if model in PROBED:
            return PROBED[model]
        training, pad = model.training, getattr(model.config, "pad_token_id", None)
        model.eval()
        plain = [i for i in range(min(self.vocab_size, 16)) if i not in (pad, self.mask_token_id)]
        ids = torch.tensor([plain[-min(8, self.max_length or 8) :]], device=self.device)
        last = (self.max_length or 1024) - ids.shape[1]
        mask = torch.cat((torch.zeros_like(ids), torch.ones_like(ids)), dim=1)
        alone = model(input_ids=ids).logits
        tolerance = torch.finfo(alone.dtype).eps ** 0.5 * (alone - alone.mean()).float().norm()

        def logits(ids: Tensor, mask: Tensor | None, first: int) -> Tensor:
            positions = self._position_ids(ids, mask, first)
            return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -alone.shape[1] :]

        def distance(logits: Tensor) -> float:
            return float((logits - alone).float().norm())

        error, first = min((distance(logits(ids, None, i)), i) for i in {0, 2, (pad or 0) + 1} if i <= last)
        one, other = (logits(torch.cat((junk, ids), dim=1), mask, first) for junk in (ids, ids.flip(1)))
        fits = error <= tolerance
        PROBED[model] = first if fits else None, fits and one.equal(other) and distance(one) <= tolerance
        model.train(training)
        return PROBED[model]


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
    overrides: Any,
    trust_remote_code: bool = False,
    device_map: Any = None,
) -> MaskedLM:
    """Load with transformers from ``folder``, whose config.json is ``raw``; only safetensors are read.

    Token ids come from ``overrides`` (:func:`unmask.load_model`'s), else the tokenizer (end of sequence falls back to
    the separator), else the config. The ``stop_ids`` of ``raw`` end completions too. With ``trust_remote_code`` the
    folder's own model class is used.
    Raises ValueError if no mask token is found, or if the weights are not all there and finite.
    """
    import transformers

    auto: Any = transformers.AutoModelForMaskedLM
    if trust_remote_code and (own := [name for name in REMOTE_CLASSES if name in raw.get("auto_map", {})]):
        auto = getattr(transformers, own[0])
    given = {"mask_token_id": overrides.mask_token_id}
    if overrides.eos_token_id is not None:
        given["eos_token_id"] = raw["eos_token_id"]
    ids = token_ids(raw, load_tokenizer, given)
    if ids["mask_token_id"] is None:
        raise ValueError(
            f"neither the tokenizer nor the config in {folder} names a mask token; "
            "give load_model(..., mask_token_id=...)"
        )
    stored = read_headers(find_shards(folder))
    if odd := {
        f"{name} ({e.dtype})" for name, e in stored.items() if e.dtype not in DTYPES and not BUFFERS.search(name)
    }:
        raise ValueError(f"{folder}: tensors must be stored as {', '.join(DTYPES)}, got {some(odd)}")
    model, info = auto.from_pretrained(
        folder,
        dtype=dtype or "auto",
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        device_map=device_map,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # named below
    )
    check_loaded(folder, model, info, stored)
    if device_map is None:
        model.to(device)
    wrapped = MaskedLM(model, **ids, logits_shift=overrides.logits_shift, stop_ids=tuple(raw["stop_ids"]))  # type: ignore[arg-type]
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        wrapped.input_device = first_device(devices)
    return wrapped.requires_grad_(False).eval()


def check_loaded(folder: Path, model: nn.Module, info: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError unless ``model`` is what is stored: nothing random, nothing left out, all of it finite."""
    tied: Any = getattr(model, "_tied_weights_keys", None) or ()  # names by which a parameter has a second one
    wrong = {
        "lacks tensors that the model needs": set(info["missing_keys"]),
        "has tensors that the model has no place for": {k for k in info["unexpected_keys"] if not UNUSED.search(k)},
        "has tensors of a shape that the config does not call for": {str(k[0]) for k in info["mismatched_keys"]},
        "has tensors with NaN or infinities": {
            name for name, p in model.named_parameters() if not p.is_meta and not bool(p.isfinite().all())
        },
        "has other values for tensors that are tied by the config": {
            entry.name
            for entry, tensor in read_tensors(entry for name, entry in stored.items() if name in tied)
            if not (p := model.get_parameter(entry.name)).is_meta and not p.cpu().equal(tensor.to(p.dtype))
        },
    }
    for what, names in wrong.items():
        if names:
            raise ValueError(f"{folder} {what}: {some(names)}")


def first_device(devices: Iterable[Any]) -> torch.device:
    """Where a model split by transformers takes its inputs: the first device that is not the CPU, else the CPU."""
    found = sorted((indexed(torch.device(d)) for d in devices if d != "disk"), key=str)
    return next((d for d in found if d.type != "cpu"), torch.device("cpu"))


def token_ids(
    raw: Mapping[str, Any], load_tokenizer: Callable[[], Any], overrides: Mapping[str, int | None]
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

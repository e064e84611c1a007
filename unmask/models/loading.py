"""``load_model`` and ``load_tokenizer``: by packaged name, local folder or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.models import dream, llada, native, placement
from unmask.models.base import ModelBase
from unmask.models.sources import CODE_FILES, CONFIG_FILES, WEIGHT_FILES, find_folder, packaged_models
from unmask.models.tokenizer import FILE_NAME, CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer
from unmask.models.unsupported import has_experts, refuse_unsupported
from unmask.models.weights import CONFIG, DTYPES, checked_weights, find_shards, read_json, save_model, stream_weights

__all__ = ["FAMILIES", "load_model", "load_tokenizer", "packaged_models", "save_model"]

FAMILIES: dict[str, Any] = {family.MODEL_TYPE: family for family in (native, llada, dream)}
"""Families the native decoder loads: modules with MODEL_TYPE, read_config and weight_names."""

COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""A Sampler refuses float64, which is for comparing forwards."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_model(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    logits_shift: int = 0,
    device_map: placement.DeviceMap | None = None,
) -> ModelBase:
    """A frozen model in eval mode; call ``requires_grad_(True)`` to train it.

    ``name_or_path``: a packaged name ("tiny"), a local folder, or a hub id ("GSAI-ML/LLaDA-8B-Instruct").
    ``dtype``: such as ``torch.bfloat16`` or "bfloat16"; None keeps the checkpoint's. LLaDA, Dream and this project's
    own format load natively; other masked language models through transformers; anything else only with
    ``trust_remote_code=True``, which runs code from the checkpoint. ``mask_token_id`` and ``eos_token_id``
    replace the checkpoint's; ``logits_shift=1`` says that a remote-code model's logits[i] predict token i + 1.

    ``device_map``, in place of ``device``, splits the model over several devices through accelerate: "auto",
    "balanced", "balanced_low_0", "sequential", or a mapping from parts of the model to devices, where "disk" leaves
    weights in the checkpoint until they are used, such as ``{"": 0, "layers.30": "cpu", "layers.31": "disk"}``. The
    parts of a native model are "embed", "layers", "layers.0", ..., "final_norm", "lm_head", and "" for all others.

    Only safetensors are read; native weights stream to their device one tensor at a time. Raises FileNotFoundError,
    ConnectionError (hub), ImportError (transformers, huggingface_hub or accelerate missing) or ValueError, naming
    the cause.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if device_map is not None and device.type != "cpu":
        raise ValueError(f"give device={str(device)!r} or device_map={device_map!r}, not both")
    patterns = CONFIG_FILES + WEIGHT_FILES + (CODE_FILES if trust_remote_code else ())
    folder = find_folder(name_or_path, revision, patterns)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    raw = read_json(folder / CONFIG)
    given = {"mask_token_id": mask_token_id, "eos_token_id": eos_token_id}
    overrides = {name: value for name, value in given.items() if value is not None}
    kind = raw.get("model_type")
    refuse_unsupported(folder / CONFIG, raw, trust_remote_code)
    if kind in FAMILIES and not has_experts(raw):
        if logits_shift:
            raise ValueError(f"logits_shift is for remote code; model_type {kind!r} has its own")
        return load_native(FAMILIES[kind], folder, {**raw, **overrides}, device, dtype, device_map)
    check_supported(folder, raw, trust_remote_code)
    find_shards(folder)
    from unmask.models.masked_lm import load_masked_lm

    return load_masked_lm(
        folder,
        raw,
        device,
        dtype,
        lambda: load_tokenizer(folder),
        overrides,
        trust_remote_code,
        logits_shift,
        device_map,
    )


def load_native(
    family: Any,
    folder: Path,
    raw: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    device_map: placement.DeviceMap | None = None,
) -> Transformer:
    """Build the decoder on the meta device and stream its weights into it; ``dtype`` None keeps the embedding's."""
    try:
        config = family.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    with torch.device("meta"):
        model = Transformer(config)
    weights = checked_weights(model, folder, family.weight_names(config))
    dtype = dtype or DTYPES[weights["embed.weight"].dtype]
    model.to(dtype)  # still without memory; weights left on the disk are read in this dtype
    placed = placement.place(model, {"": device} if device_map is None else device_map, dtype, checked_device)

    def place(parameter: str) -> torch.device | None:
        part = next(part for part in placed if parameter.startswith(f"{part}."))
        where = placed[part]
        return where if isinstance(where, torch.device) else None

    stream_weights(model, weights, dtype, place, placement.input_device(placed))
    on_disk = {
        name: {"safetensors_file": str(entry.file), "weight_name": entry.name, "dtype": str(dtype).split(".")[1]}
        for name, entry in weights.items()
        if place(name) is None
    }
    if config.tie_embeddings and "embed.weight" in on_disk:
        on_disk["lm_head.weight"] = on_disk["embed.weight"]
    placement.dispatch(model, placed, on_disk)
    model.generation_defaults = generation_defaults(folder, raw)
    return model.requires_grad_(False).eval()


def generation_defaults(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler settings under ``generation_defaults`` in a checkpoint of this project."""
    value = raw.get("generation_defaults", {}) if raw.get("model_type") == native.MODEL_TYPE else {}
    if not isinstance(value, dict):
        raise ValueError(f"{folder / CONFIG}: generation_defaults must be an object, got {value!r}")
    return dict(value)


def check_supported(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise ValueError, listing what is supported, for a model type that cannot be loaded."""
    kind = raw.get("model_type")
    own_code = isinstance(raw.get("auto_map"), dict)
    if trust_remote_code and own_code:
        return
    try:
        from unmask.models.masked_lm import supported_types

        types = supported_types()
    except ImportError:
        raise ImportError(
            f"{folder / CONFIG}: model_type {kind!r} is not native ({', '.join(FAMILIES)}); masked language models "
            "load through transformers: pip install transformers"
        ) from None
    if kind in types and not raw.get("is_encoder_decoder"):
        return
    hint = "; trust_remote_code=True runs the code it brings, if you trust it" if own_code else ""
    raise ValueError(
        f"{folder / CONFIG}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)} and the masked "
        f"language models of transformers (bert, roberta, modernbert, ...){hint}"
    )


def load_tokenizer(name_or_path: str | Path, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The tokenizer beside a model: a :class:`CharTokenizer` or :class:`WordTokenizer` for models of this project's
    own format, else transformers' AutoTokenizer.

    Dream's tokenizer, published as remote code, is Qwen2's and is read as such. Raises as :func:`load_model` does.
    """
    patterns = CONFIG_FILES + (CODE_FILES if trust_remote_code else ())
    folder = find_folder(name_or_path, revision, patterns)
    if (folder / FILE_NAME).is_file():
        return CharTokenizer.from_pretrained(folder)
    own = (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == native.MODEL_TYPE
    if own and (words := WordTokenizer.of_folder(folder)) is not None:
        return words
    # Without any of these, transformers builds an empty tokenizer for some model types.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.model")):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}, {FILE_NAME}, *.model"
        )
    try:
        import transformers
    except ImportError:
        raise ImportError(f"the tokenizer in {folder} needs transformers: pip install transformers") from None
    path = folder / "tokenizer_config.json"
    published = read_json(path).get("tokenizer_class") if path.is_file() else None
    if published == "DreamTokenizer" and not trust_remote_code:
        return transformers.Qwen2Tokenizer.from_pretrained(folder)
    if published == "PreTrainedTokenizerFast" and not trust_remote_code:  # without reading the model's config
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )


def checked_device(device: str | torch.device) -> torch.device:
    """``device`` as torch has it. Raises RuntimeError or ValueError if this process does not have it."""
    found = torch.device(device)
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device {str(device)!r} was asked for, but this torch sees no CUDA device")
        if found.index is not None and found.index >= torch.cuda.device_count():
            raise ValueError(f"device {str(device)!r} was asked for, but there are {torch.cuda.device_count()}")
    return found


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype itself or by its name. Raises ValueError for one that models cannot compute in."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in COMPUTABLE:
        raise ValueError(f"dtype must be one of {', '.join(map(str, COMPUTABLE))} or its name, got {dtype!r}")
    return found

"""``load_model`` and ``load_tokenizer``: by packaged name, local folder or hub id."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unmask.config import check_known
from unmask.models import dream, fast_dllm, illada, llada, llada2, native, nemotron, placement, sdar, sdar_moe
from unmask.models.base import ModelBase
from unmask.models.overrides import Overrides
from unmask.models.presets import family_defaults, full_name
from unmask.models.sources import (
    CODE_FILES,
    CONFIG,
    CONFIG_FILES,
    WEIGHT_FILES,
    find_folder,
    packaged_models,
    read_json,
)
from unmask.models.tokenizer import FILE_NAME, CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.models.unsupported import has_experts, refuse_unsupported
from unmask.models.weights import StoredWeights, find_shards, read_headers, save_model

if TYPE_CHECKING:
    from unmask.models.quantization import Quantizer, Scheme

__all__ = ["FAMILIES", "load_model", "load_tokenizer", "packaged_models", "save_model"]

FAMILIES: dict[str, Any] = {
    family.MODEL_TYPE: family
    for family in (
        native, llada.LLaDAConfig, dream.DreamConfig, illada.ILLaDAConfig, sdar.SDARConfig, sdar_moe.SDARMoeConfig,
        llada2.LLaDA2Config, fast_dllm.FastDLLMConfig, nemotron.NemotronConfig,
    )
}  # fmt: skip
"""Families the native decoder loads, with MODEL_TYPE, read_config, weight_names, and perhaps finish, which does what
remains to be done when weights are read."""

DIFFUSION_GEMMA = "diffusion_gemma"
"""Loaded by transformers' own class."""

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
    device_map: placement.DeviceMap | None = None,
    **overrides: Any,
) -> ModelBase:
    """A frozen model in eval mode; call ``requires_grad_(True)`` to train it.

    ``name_or_path``: a packaged name ("tiny"), a local folder, or a hub id ("GSAI-ML/LLaDA-8B-Instruct").
    ``dtype``: None keeps the checkpoint's. :data:`FAMILIES` load natively; other masked language models through
    transformers; anything else only with ``trust_remote_code=True``, which runs code from the checkpoint.

    ``overrides``: ``mask_token_id`` and ``eos_token_id`` (one id or a list) replace the checkpoint's, ``block_length``
    the block size of a model that is not bidirectional. ``quantization`` is "int8", "int8-dynamic" (for CPUs: tokens
    are rounded to 8 bits too) or "int4", see :mod:`unmask.models.quantization`. ``logits_shift=1`` says that a
    remote-code model's logits[i] predict token i + 1. ``causal_context=False`` makes Nemotron-Labs-Diffusion see its
    prompt and finished blocks in both directions.

    ``device_map``, in place of ``device``, splits the model over several devices through accelerate: "auto",
    "balanced", "balanced_low_0", "sequential", or a mapping from parts of the model to devices, where "disk" leaves
    weights in the checkpoint until they are used, such as ``{"": 0, "layers.30": "cpu", "layers.31": "disk"}``. The
    parts of a native model are "embed", "layers", "layers.0", ..., "final_norm", "lm_head", and "" for all others.

    Only safetensors are read; native weights stream to their device one tensor at a time. Raises FileNotFoundError,
    ConnectionError (hub), ImportError (transformers, huggingface_hub, accelerate or torchao missing) or ValueError,
    naming the cause.
    """
    check_known(overrides, [f.name for f in fields(Overrides)], "arguments of load_model")
    changes = Overrides(**overrides)
    device, dtype = checked_device(device), checked_dtype(dtype)
    if device_map is None:
        warn_if_slow(device, dtype)
    parts = placement.with_parts(device_map)
    if device_map is not None and device.type != "cpu":
        raise ValueError(f"give device={str(device)!r} or device_map={device_map!r}, not both")
    if changes.quantization is not None and device_map is not None:
        raise ValueError(f"quantization={changes.quantization!r} is for one device, got device_map={device_map!r}")
    patterns = CONFIG_FILES + WEIGHT_FILES + (CODE_FILES if trust_remote_code else ())
    folder = find_folder(name_or_path, revision, patterns)
    kind, raw, config = read_folder(folder, str(name_or_path), changes, trust_remote_code)
    if kind == DIFFUSION_GEMMA:
        from unmask.models.diffusion_gemma import load_diffusion_gemma

        return load_diffusion_gemma(folder, raw, device, dtype, changes, device_map)
    if config is not None:
        model = load_native(FAMILIES[kind], config, folder, raw, device, dtype, parts, changes.quantization)
        model.generation_defaults = generation_defaults(folder, str(name_or_path), raw, config)
        return model
    check_supported(folder, raw, trust_remote_code)
    find_shards(folder)
    from unmask.models.masked_lm import load_masked_lm

    tokenizer = functools.partial(load_tokenizer, folder)
    return load_masked_lm(folder, raw, device, dtype, tokenizer, changes, trust_remote_code, parts)


def read_folder(
    folder: Path, name: str, changes: Overrides, trust_remote_code: bool = False
) -> tuple[str, dict[str, Any], TransformerConfig | None]:
    """Model type, config.json with ``changes``, and the decoder's configuration, None where that is not ours.

    ``name`` is what the folder was asked for by. Raises FileNotFoundError or ValueError for a folder that holds no
    model, or one that would be decoded wrongly.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    raw = read_json(folder / CONFIG)
    kind = str(raw.get("model_type"))
    refuse_unsupported(folder / CONFIG, raw, trust_remote_code)
    raw = changes.of(folder, raw, full_name(name))
    check_changes(changes, kind, folder)
    config = read_config(FAMILIES[kind], folder, raw) if kind in FAMILIES and not has_experts(raw) else None
    check_parts(changes, kind, config, trust_remote_code and "auto_map" in raw)
    return kind, raw, config


def check_changes(changes: Overrides, kind: str, folder: Path) -> None:
    """Raise ValueError for an override that the model type does not have."""
    of_nemotron = nemotron.NemotronConfig.MODEL_TYPE
    if changes.causal_context is not None and kind != of_nemotron:
        raise ValueError(f"causal_context is for model_type {of_nemotron!r}, but {folder} is {kind!r}")
    if changes.block_length is not None and kind == native.MODEL_TYPE:
        seen = read_json(folder / CONFIG).get("attention", "bidirectional")
        if seen == "bidirectional":
            raise ValueError(whole_canvas(changes.block_length, kind))


def whole_canvas(block_length: int, kind: str) -> str:
    return (
        f"block_length={block_length} is for models that see blocks, but model_type {kind!r} sees "
        "the whole canvas; SamplerConfig(block_length=...) says in which blocks that is decoded"
    )


def check_parts(changes: Overrides, kind: str, config: TransformerConfig | None, remote: bool) -> None:
    """The same for what depends on the ``config`` of a native model, and on whether ``remote`` code runs."""
    if changes.logits_shift and not remote:
        raise ValueError(f"logits_shift is for remote code; model_type {kind!r} has its own")
    if changes.quantization is not None and config is None:
        raise ValueError(f"quantization={changes.quantization!r} is for native models, but model_type {kind!r} is not")
    whole = config is None or config.block_length is None
    if changes.block_length is not None and whole and kind != DIFFUSION_GEMMA:
        raise ValueError(whole_canvas(changes.block_length, kind))


def read_config(family: Any, folder: Path, raw: Mapping[str, Any]) -> TransformerConfig:
    """The decoder's configuration; ValueError names the folder."""
    try:
        config: TransformerConfig = family.read_config(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return config


def load_native(
    family: Any,
    config: TransformerConfig,
    folder: Path,
    raw: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    device_map: str | Mapping[str, Any] | None = None,
    quantization: Scheme | None = None,
) -> Transformer:
    """Build the decoder on the meta device and stream its weights into it; ``dtype`` None keeps the embedding's."""
    if config.num_layers > (count := len(read_headers(find_shards(folder)))):  # which would take for ever to build
        raise ValueError(f"{folder}: the config calls for {config.num_layers} layers, the weights are {count} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    weights = StoredWeights(model, folder, family.weight_names)
    dtype = dtype or weights.stored_dtype("embed.weight")
    model.to(dtype)  # still without memory; weights left on the disk are read in this dtype
    quantizer = None if quantization is None else make_quantizer(quantization, device, dtype)
    placed = placement.place(model, {"": device} if device_map is None else device_map, dtype, checked_device)

    def place(parameter: str) -> torch.device | None:
        where = placed[next(part for part in placed if parameter.startswith(f"{part}."))]
        return where if isinstance(where, torch.device) else None

    weights.stream(model, place, quantizer)
    model.quantization = quantization
    model.rotary.to_empty(device=placement.input_device(placed))
    if hasattr(family, "finish"):
        family.finish(model, raw)
    placement.dispatch(model, placed, weights)
    return model.requires_grad_(False).eval()


def make_quantizer(scheme: Scheme, device: torch.device, dtype: torch.dtype) -> Quantizer:
    """Raises ImportError without torchao, ValueError for a device or dtype that ``scheme`` does not support."""
    try:
        from unmask.models.quantization import Quantizer
    except ImportError as error:
        said = f'quantization={scheme!r} needs torchao: pip install "unmask[quantization]"'
        raise ImportError(f"{said} ({error})") from None
    return Quantizer(scheme, device, dtype)


def generation_defaults(folder: Path, name: str, raw: Mapping[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """Sampler settings: under ``generation_defaults`` in a checkpoint of this project, else the family's preset."""
    if raw["model_type"] != native.MODEL_TYPE:
        return family_defaults(raw["model_type"], full_name(name), config)
    value = raw.get("generation_defaults", {})
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
    try:
        found = torch.device(device)
        if found.type != "cuda":
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise RuntimeError(f"device {device!r}: {str(error).splitlines()[0]}") from None
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


def warn_if_slow(device: torch.device, dtype: torch.dtype | None) -> None:
    """Warns of a 16-bit dtype that was asked for on a CPU whose matrix products in it are emulated."""
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    check = getattr(torch.ops.mkldnn, checks[dtype], None) if device.type == "cpu" and dtype in checks else None
    if check is not None and not check():
        warnings.warn(
            f"this CPU has no instructions for {str(dtype)[6:]}; float32 can be ten times as fast, in twice the memory",
            stacklevel=3,
        )

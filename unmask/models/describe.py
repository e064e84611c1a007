"""What a model's folder holds, read from its configuration and the headers of its weights; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from unmask.models.config_values import ids_of
from unmask.models.loading import DIFFUSION_GEMMA, check_supported, generation_defaults, load_tokenizer, read_folder
from unmask.models.masked_lm import token_ids
from unmask.models.native import MODEL_TYPE
from unmask.models.overrides import Overrides
from unmask.models.presets import full_name, preset_of
from unmask.models.sources import CONFIG_FILES, find_folder
from unmask.models.weights import find_shards, read_headers


def describe_model(name: str, revision: str | None = None) -> dict[str, Any]:
    """Family, sizes, attention, token ids and recommended settings of a packaged name, a folder or a hub id.

    Of a hub id only the configuration and the tokenizer are fetched. Raises the errors of :func:`load_model` for what
    holds no model or one that is refused.
    """
    folder = find_folder(name, revision, CONFIG_FILES)
    kind, raw, config = read_folder(folder, name, Overrides())
    if config is None and kind != DIFFUSION_GEMMA:
        check_supported(folder, raw, False)
    preset, tokenizer = preset_of(kind, full_name(name)), None
    with suppress(OSError, ImportError, ValueError, KeyError):
        tokenizer = load_tokenizer(folder)
    ids = {"mask_token_id": config.mask_token_id} if config else token_ids(raw, lambda: tokenizer, {})
    stops = config.stop_ids if config else ids_of("eos_token_id", ids["eos_token_id"], raw["stop_ids"])
    own = {MODEL_TYPE: "this project's own format", DIFFUSION_GEMMA: "transformers' own class"}
    how = own.get(kind, "native" if config else "masked language model through transformers")
    about: dict[str, Any] = {"folder": str(folder), "family": f"{kind}, {preset.models if preset else how}"}
    about |= weights_of(folder)
    if config:
        about["layers"] = f"{config.num_layers} of {config.hidden_size}, {config.num_heads} heads of {config.head_dim}"
        if config.mixture:
            about["experts"] = f"{config.mixture.num_experts}, {config.mixture.num_experts_per_tok} per token"
    about["vocabulary"], about["context"] = raw.get("vocab_size"), config.max_position_embeddings if config else None
    about["attention"] = config.attention if config else "bidirectional"
    about["block length"] = config.block_length if config else None
    about["mask id"] = labelled(ids["mask_token_id"], tokenizer)
    about["stop ids"] = ", ".join(labelled(i, tokenizer) for i in stops)
    about["chat template"] = "yes" if getattr(tokenizer, "chat_template", None) else "no"
    settings = generation_defaults(folder, name, raw, config) if config else dict(preset.settings) if preset else {}
    about["recommended"] = as_options(settings)
    about |= {"source": preset.source, "authors' own": preset.careful} if preset else {}
    return {key: value for key, value in about.items() if value not in (None, "")}


def weights_of(folder: Path) -> dict[str, str]:
    """Parameters, dtypes and bytes of the stored tensors; empty without weights."""
    try:
        stored = [header for header in read_headers(find_shards(folder)).values() if header.is_weight]
    except FileNotFoundError:
        return {}
    count, size = sum(math.prod(s.shape) for s in stored), sum(s.size for s in stored)
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return {"parameters": f"{count:,} ({', '.join(sorted({s.dtype for s in stored}))}, {size / unit:.3g} {name})"}


def labelled(token: int | None, tokenizer: Any) -> str:
    """A token's id with its name, if there is one."""
    if token is None:
        return ""
    name = tokenizer.convert_ids_to_tokens([token])[0] if tokenizer is not None else None
    return f"{token} {name}" if name else str(token)


def as_options(settings: Mapping[str, Any]) -> str:
    """Settings of a Sampler as the command line takes them."""
    given = {key: value for key, value in settings.items() if value is not None or key == "block_length"}
    pairs = sorted(given.items(), key=lambda pair: pair[0] == "policy")
    return " ".join(f"--{key.replace('_', '-')} {'full' if value is None else value}" for key, value in pairs)

"""Arguments of transformers' ``generate`` as settings of a Sampler; what has no meaning here is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from unmask.sampling.config import SamplerConfig

DRAWN = ("temperature", "top_k", "top_p")
"""What says how tokens are drawn, and nothing without ``do_sample``."""
SHARED = ("repetition_penalty", "num_return_sequences")
"""Further names that transformers and SamplerConfig have in common."""
MEANT = ("do_sample", "max_length", "max_new_tokens", *DRAWN, *SHARED, "stop_strings", "eos_token_id")
"""Arguments of transformers that settings are made from."""

SETTINGS = tuple(f.name for f in fields(SamplerConfig) if f.name not in MEANT)
"""Fields of SamplerConfig that transformers has no name for: they pass through under their own."""

NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "length_penalty", "guidance_scale", "top_p"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_length"), 0),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}
"""The value that asks for nothing, mostly of arguments without a meaning here."""

WITHOUT_EFFECT = ("use_cache", "pad_token_id", "bos_token_id", "transformers_version", "synced_gpus")
"""Arguments that change nothing about which tokens are generated."""


def sampler_settings(arguments: Mapping[str, Any], prompt_length: int = 0) -> dict[str, Any]:
    """Fields of SamplerConfig for ``arguments`` named as transformers' GenerationConfig names them.

    ``max_new_tokens``, or ``max_length`` less ``prompt_length``, is the length of the buffer; ``do_sample`` with
    ``temperature`` (1 if none is given) is the temperature of the tokens, 0 without; ``top_k`` and ``top_p`` go with
    it; ``stop_strings`` is ``stop`` and ``eos_token_id``, one or several, ``stop_ids``; ``repetition_penalty``,
    ``num_return_sequences`` and fields of SamplerConfig that transformers has no name for (``block_length``, ``seed``,
    ``alpha``, ...) pass through. Only what is given is set.

    Raises ValueError for an argument that has no meaning for a masked diffusion model (``num_beams=4``), or none at
    all, unless its value asks for nothing (None, ``num_beams=1``), and for settings that contradict each other.
    """
    settings = {name: arguments[name] for name in SETTINGS if name in arguments}
    given = {name: value for name, value in arguments.items() if name not in SETTINGS and value is not None}
    for name, value in given.items():
        if name not in MEANT and not asks_for_nothing(name, value):
            known = f"the arguments are {', '.join(MEANT)} and the fields of SamplerConfig: {', '.join(SETTINGS)}"
            hint = f"use {SamplerConfig.RENAMED[name]}" if name in SamplerConfig.RENAMED else known
            raise ValueError(
                f"{name}={shortened(value)} has no meaning when a masked diffusion model is decoded; {hint}"
            )
    if "max_new_tokens" in given:
        settings["max_new_tokens"] = given["max_new_tokens"]  # SamplerConfig checks it
    elif "max_length" in given:
        total = given["max_length"]
        if not isinstance(total, int) or total <= prompt_length:
            raise ValueError(
                f"max_length must be an integer above the {prompt_length} tokens of the prompt, which it counts, got "
                f"{total!r}; give max_new_tokens"
            )
        settings["max_new_tokens"] = total - prompt_length
    sample, temperature = given.get("do_sample"), given.get("temperature")
    if sample not in (None, True, False):
        raise ValueError(f"do_sample must be true or false, got {sample!r}")
    for name in DRAWN:
        value = given.get(name)
        nothing = (None, 0, 1) if name == "temperature" else (None, NEUTRAL[name])  # 1 is what transformers fills in
        if not sample and value not in nothing:
            raise ValueError(f"{name}={value!r} has no effect without do_sample=True, got do_sample={sample!r}")
        if sample and value not in nothing:
            settings[name] = value
    settings |= {name: given[name] for name in SHARED if given.get(name, 1) != 1}
    settings |= {"stop": given["stop_strings"]} if "stop_strings" in given else {}
    settings |= {"stop_ids": ids} if (ids := ids_of("eos_token_id", given.get("eos_token_id"))) else {}
    if sample:
        settings["temperature"] = 1.0 if temperature is None else temperature
    elif sample is not None or temperature is not None:
        settings["temperature"] = 0.0
    return settings


def ids_of(name: str, value: Any) -> tuple[int, ...]:
    """The ids that transformers allows as one, a list, or a tensor; ValueError names another value."""
    ids = value.flatten().tolist() if isinstance(value, Tensor) else value
    ids = [] if ids is None else ids if isinstance(ids, (list, tuple)) else [ids]
    if any(not isinstance(i, int) or isinstance(i, bool) for i in ids):
        raise ValueError(f"{name} must be an integer or a list of integers, got {value!r}")
    return tuple(dict.fromkeys(ids))


def shortened(value: Any) -> str:
    """The beginning of its repr, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` leaves the generation as it is: None, False and what is empty do under any name."""
    empty = isinstance(value, (list, tuple, dict)) and not value
    return value is None or value is False or empty or name in WITHOUT_EFFECT or NEUTRAL.get(name) == value

"""Arguments of transformers' ``generate`` as settings of a Sampler; what has no meaning here is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unmask.sampling.config import SamplerConfig

MEANT = ("do_sample", "max_length", "max_new_tokens", "temperature")
"""Arguments of transformers that settings are made from."""

SETTINGS = tuple(f.name for f in fields(SamplerConfig) if f.name not in MEANT)
"""Fields of SamplerConfig that transformers has no name for: they pass through under their own."""

NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "min_length"), 0),
    **dict.fromkeys(("min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
}
"""Arguments without a meaning here, and the value of each that asks for nothing."""

WITHOUT_EFFECT = ("use_cache", "pad_token_id", "bos_token_id", "transformers_version", "synced_gpus")
"""Arguments that change nothing about which tokens are generated."""


def sampler_settings(arguments: Mapping[str, Any], prompt_length: int = 0) -> dict[str, Any]:
    """Fields of SamplerConfig for ``arguments`` named as transformers' GenerationConfig names them.

    ``max_new_tokens``, or ``max_length`` less ``prompt_length``, is the length of the buffer; ``do_sample`` with
    ``temperature`` (1 if none is given) is the temperature of the tokens, 0 without; fields of SamplerConfig that
    transformers has no name for (``block_length``, ``seed``, ``alpha``, ...) pass through. Only what is given is set.

    Raises ValueError for an argument that has no meaning for a masked diffusion model (``num_beams=4``), or none at
    all, unless its value asks for nothing (None, ``num_beams=1``), and for settings that contradict each other.
    """
    settings = {name: arguments[name] for name in SETTINGS if name in arguments}
    given = {name: value for name, value in arguments.items() if name not in SETTINGS and value is not None}
    for name, value in given.items():
        if name not in MEANT and not asks_for_nothing(name, value):
            raise ValueError(
                f"{name}={shortened(value)} has no meaning when a masked diffusion model is decoded; the arguments are "
                f"{', '.join(MEANT)} and the fields of SamplerConfig: {', '.join(SETTINGS)}"
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
    if not sample and temperature not in (None, 0, 1):  # 1 is what transformers fills in, and says nothing
        raise ValueError(f"temperature={temperature!r} has no effect without do_sample=True, got do_sample={sample!r}")
    if sample:
        settings["temperature"] = 1.0 if temperature is None else temperature
    elif sample is not None or temperature is not None:
        settings["temperature"] = 0.0
    return settings


def shortened(value: Any) -> str:
    """The beginning of its repr, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` leaves the generation as it is: None, False and what is empty do under any name."""
    empty = isinstance(value, (list, tuple, dict)) and not value
    return value is None or value is False or empty or name in WITHOUT_EFFECT or NEUTRAL.get(name) == value

"""Arguments of transformers' ``generate`` as settings of a Sampler; what has no meaning here is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from unmask.config import PositiveInt, checked
from unmask.sampling.config import SamplerConfig

SETTINGS = tuple(f.name for f in fields(SamplerConfig) if f.name not in ("max_new_tokens", "temperature"))
"""Fields of SamplerConfig that transformers has no name for: they pass through under their own."""

MEANT = frozenset({"max_new_tokens", "max_length", "do_sample", "temperature"})
"""Arguments of transformers that settings are made from."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1,)),
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), (1.0,)),
    **dict.fromkeys(("top_k", "min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (0,)),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    "length_penalty": (1.0,),
    "guidance_scale": (1.0,),
}
"""Arguments without a meaning here, at the values that ask for nothing; None, False and empty lists ask for nothing
under any name."""

WITHOUT_EFFECT = frozenset({"use_cache", "pad_token_id", "bos_token_id", "transformers_version", "synced_gpus"})
"""Arguments that change nothing about which tokens are generated."""


def sampler_settings(arguments: Mapping[str, Any], prompt_length: int = 0) -> dict[str, Any]:
    """Fields of SamplerConfig for ``arguments`` named as transformers' GenerationConfig names them.

    ``max_new_tokens``, or ``max_length`` less ``prompt_length``, is the length of the buffer; ``do_sample`` with
    ``temperature`` (1 if none is given) is the temperature of the tokens, 0 without; fields of SamplerConfig that
    transformers has no name for (``block_length``, ``seed``, ``alpha``, ...) pass through. Only what is given is set.

    Raises ValueError for an argument that has no meaning for a masked diffusion model (``num_beams=4``), or none at
    all, unless its value asks for nothing (None, ``num_beams=1``).
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    settings = {name: arguments[name] for name in SETTINGS if name in arguments}
    for name, value in given.items():
        if not (name in MEANT or name in SETTINGS or asks_for_nothing(name, value)):
            raise ValueError(
                f"{name}={value!r} has no meaning when a masked diffusion model is decoded; the arguments are "
                f"{', '.join(sorted(MEANT))} and the fields of SamplerConfig: {', '.join(SETTINGS)}"
            )
    length = buffer_length(given, prompt_length)
    if length is not None:
        settings["max_new_tokens"] = length
    if "do_sample" in given or "temperature" in given:
        settings["temperature"] = token_temperature(given.get("do_sample"), given.get("temperature"))
    return settings


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether ``value`` leaves the generation as it is."""
    if value is False or value is None or (isinstance(value, (list, tuple, dict)) and not value):
        return True
    return name in WITHOUT_EFFECT or value in NEUTRAL.get(name, ())


def buffer_length(given: Mapping[str, Any], prompt_length: int) -> Any:
    """L from ``max_new_tokens``, else from ``max_length``, which counts the prompt; None if neither is given."""
    if "max_new_tokens" in given:
        return given["max_new_tokens"]  # SamplerConfig checks it
    if "max_length" not in given:
        return None
    length = checked("max_length", given["max_length"], PositiveInt)
    if length <= prompt_length:
        raise ValueError(
            f"max_length={length} counts the prompt, whose {prompt_length} tokens leave no room; give max_new_tokens"
        )
    return length - prompt_length


def token_temperature(do_sample: Any, temperature: Any) -> float:
    """0 without sampling, else ``temperature``, 1 by default; ValueError where the two contradict each other."""
    if do_sample:
        return 1.0 if temperature is None else temperature
    # 1 is what transformers fills in, and says nothing.
    if temperature not in (None, 0, 1):
        raise ValueError(
            f"temperature={temperature!r} has no effect without do_sample=True, got do_sample={do_sample!r}"
        )
    return 0.0

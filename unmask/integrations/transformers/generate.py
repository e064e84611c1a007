"""``generate`` on transformers' models by the one Sampler: as a function, and as ``custom_generate`` in both forms."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.integrations.transformers.arguments import SETTINGS, ids_of, sampler_settings
from unmask.models.base import ModelBase, real_positions
from unmask.models.loading import DIFFUSION_GEMMA, FAMILIES
from unmask.models.masked_lm import MaskedLM
from unmask.policies.base import UnmaskingPolicy
from unmask.sampling.result import GenerationResult, first_stop
from unmask.sampling.sampler import Sampler
from unmask.sampling.streaming import Streamer

FROM_TRANSFORMERS = ("use_cache", "cache", "past_key_values", "logits_to_keep")
"""What transformers prepares for an autoregressive loop and hands to a callable; nothing here has a use for it."""

ONLY_IN_CALLER = ("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask")
"""What it hands to its own methods only; nothing here has a meaning for them."""
WHOLE = ("llada", "illada")
"""Native model types whose own code gives aligned logits of a whole canvas, seen in both directions."""

FROM_CONFIG = (
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "RepetitionPenaltyLogitsProcessor"),
    *("MaxLengthCriteria", "EosTokenCriteria"),
)
"""Processors and criteria that transformers makes of the configuration, which is read here itself."""


def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    streamer: Streamer | None = None,
    policy: str | UnmaskingPolicy | None = None,
    mask_token_id: int | None = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> Tensor | GenerationResult:
    """Complete ``inputs`` (B, P) int64 by unmasking, with the arguments of transformers' ``generate``.

    Also the ``generate`` of the repository :data:`unmask.integrations.transformers.CUSTOM_GENERATE`.

    Args:
        model: a transformers masked language model, a model of :func:`unmask.load_model`, or a Sampler, whose policy
            and config are then the defaults.
        inputs: prompt ids, or ``input_ids=``; left-padded with ``attention_mask=``.
        generation_config: a GenerationConfig; arguments given beside it win.
        streamer: see :meth:`unmask.Sampler.generate`.
        policy: a name such as "threshold:0.9", or an object.
        mask_token_id: of a transformers model; None: the tokenizer's, else that of the model's config.
        tokenizer: asked for ``mask_token_id``, and for the texts in which ``stop_strings`` are looked for.
        **arguments: see :func:`sampler_settings`; also ``pad_token_id`` and ``return_dict_in_generate``.

    Returns:
        (B, P + N) int64, N as long as the longest completion with its end of sequence or stop string; what follows a
        row's end is padding. With ``return_dict_in_generate=True`` the GenerationResult, ``sequences`` as just said.

    Raises:
        ValueError: an argument without a meaning here, or a bad value; it is named.
    """
    if generation_config is not None:
        arguments = {**fields_of(generation_config), **arguments}
    given = arguments.pop("input_ids", None)
    prompts = given if inputs is None else inputs
    if not isinstance(prompts, Tensor):
        raise TypeError(f"inputs must be an int64 tensor (B, P) of token ids, got {type(prompts).__name__}")
    arguments["mask_token_id"] = mask_token_id
    return run(model, prompts, arguments.pop("attention_mask", None), streamer, policy, tokenizer, arguments)


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    generation_config: Any = None,
    streamer: Streamer | None = None,
    policy: str | UnmaskingPolicy | None = None,
    mask_token_id: int | None = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> Tensor | GenerationResult:
    """The same for ``model.generate(..., custom_generate=custom_generate)``: transformers prepares, this decodes.

    ``policy``, ``mask_token_id`` and the fields of SamplerConfig (``block_length=8``) are given to ``model.generate``.
    It keeps ``streamer`` and ``tokenizer`` to itself, so these have to be bound: ``functools.partial(custom_generate,
    streamer=..., tokenizer=...)``; with a tokenizer, ``stop=["Q:"]`` is possible, while ``stop_strings`` is not.
    transformers' default ``top_k=50`` counts as not given unless the call itself has it: the tokens are sampled from
    the whole distribution.

    Raises ValueError as :func:`generate` does, also for logits processors and stopping criteria of the caller's own.
    """
    caller = sys._getframe(1).f_locals  # of `model.generate`
    arguments |= {name: caller[name] for name in ONLY_IN_CALLER if caller.get(name) is not None}
    if caller.get("streamer") is not None:
        raise ValueError("streamer= does not reach custom_generate: functools.partial(custom_generate, streamer=...)")
    defaults = type(generation_config)._get_default_generation_params()
    config = {n: v for n, v in fields_of(generation_config).items() if n not in defaults or v != defaults[n]}
    # The rows are repeated already, and the length is prepared: it counts the prompt.
    config |= {"num_return_sequences": None, "max_new_tokens": None, "max_length": generation_config.max_length}
    arguments = {name: value for name, value in arguments.items() if name not in FROM_TRANSFORMERS}
    attention, arguments["mask_token_id"] = arguments.pop("attention_mask", None), mask_token_id
    arguments |= {"logits_processor": foreign(logits_processor), "stopping_criteria": foreign(stopping_criteria)}
    return run(model, input_ids, attention, streamer, policy, tokenizer, {**config, **arguments})


# transformers hands over only the arguments that it finds in the signature.
_signature = inspect.signature(custom_generate)
_own = list(_signature.parameters.values())
_names = [name for name in (*SETTINGS, "top_k", "top_p", "repetition_penalty") if "cache" not in name]
_fields = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _names]
custom_generate.__signature__ = _signature.replace(parameters=[*_own[:-1], *_fields, _own[-1]])  # type: ignore[attr-defined]


def foreign(hooks: Sequence[Any] | None) -> list[str]:
    """The classes of those that transformers did not make of the configuration."""
    return [type(hook).__name__ for hook in hooks or () if type(hook).__name__ not in FROM_CONFIG]


def fields_of(generation_config: Any) -> dict[str, Any]:
    """The public fields of a GenerationConfig."""
    return {name: value for name, value in generation_config.to_dict().items() if not name.startswith("_")}


def run(
    model: Any,
    prompts: Tensor,
    attention: Tensor | None,
    streamer: Streamer | None,
    policy: str | UnmaskingPolicy | None,
    tokenizer: Any,
    arguments: dict[str, Any],
) -> Tensor | GenerationResult:
    """Decode ``prompts`` (B, P) with arguments named as transformers names them, and return what it would."""
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompts.dtype != torch.int64:
        got = f"{prompts.dtype} {tuple(prompts.shape)}" if isinstance(prompts, Tensor) else type(prompts).__name__
        raise TypeError(f"inputs must be int64 of shape (B, P), got {got}")
    mask, pad = arguments.pop("mask_token_id"), single_id("pad_token_id", arguments.pop("pad_token_id", None))
    mask = getattr(tokenizer, "mask_token_id", None) if mask is None else mask
    as_result = arguments.pop("return_dict_in_generate", None)
    check_inputs(prompts, attention, arguments.pop("position_ids", None), arguments.pop("token_type_ids", None))
    settings = sampler_settings(arguments, prompts.shape[1])
    reader = tokenizer if settings.get("stop") else None
    sampler = as_sampler(model, policy, mask, settings.get("stop_ids") or (), reader)
    result = sampler.generate(prompts, attention, streamer=streamer, **settings)
    config = sampler.config.updated(settings)
    if config.stop_at_eos:
        ends = sampler.stop_ids if config.stop_ids is None else config.stop_ids
        pad = sampler.padding_id if pad is None and (sampler.on_canvases or not ends) else pad
        result = replace(result, sequences=trimmed(result, prompts.shape[1], ends, pad, bool(config.stop)))
    return result if as_result else result.sequences


def check_inputs(
    prompts: Tensor, attention: Tensor | None, position_ids: Tensor | None, token_type_ids: Tensor | None
) -> None:
    """Refuse positions other than those the models here use, and a second segment: what is generated has one only."""
    real = torch.ones_like(prompts) if attention is None else attention
    if position_ids is not None and bool(((position_ids != real_positions(real)) & real.bool()).any()):
        raise ValueError("position_ids must count the real tokens of each row from 0; others are not supported")
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise ValueError("token_type_ids must be all 0; prompts of several segments are not supported")


def as_sampler(
    model: Any,
    policy: str | UnmaskingPolicy | None,
    mask_token_id: int | None,
    stop_ids: tuple[int, ...],
    tokenizer: Any = None,
) -> Sampler:
    """A Sampler for a transformers model, a model of this project, or a Sampler; ValueError for another mask token.

    ``tokenizer``: for a Sampler without one.
    """
    if not isinstance(model, (Sampler, ModelBase)):
        return Sampler(wrap(model, mask_token_id, stop_ids), tokenizer, policy)
    inner = model.model if isinstance(model, Sampler) else model
    if mask_token_id not in (None, inner.mask_token_id):
        asked = f"mask_token_id={mask_token_id}"
        raise ValueError(f"{asked} is not the model's, which is {inner.mask_token_id}; load_model(..., {asked})")
    if not isinstance(model, Sampler):
        return Sampler(inner, tokenizer, policy)
    if policy is None and (tokenizer is None or model.tokenizer is not None):
        return model
    chosen = model.policy if policy is None else policy
    return Sampler(inner, model.tokenizer or tokenizer, chosen, model.config)


def wrap(model: Any, mask_token_id: int | None, stop_ids: tuple[int, ...]) -> ModelBase:
    """``model`` of transformers behind the model interface; nothing is copied."""
    config = getattr(model, "config", None)
    if config is None:
        raise TypeError(
            f"model must be a transformers model, a model of load_model or a Sampler, got {type(model).__name__}"
        )
    kind = getattr(config, "model_type", None)
    if kind == DIFFUSION_GEMMA:
        from unmask.models.diffusion_gemma import DiffusionGemma

        return DiffusionGemma(model, stop_ids or None)
    if kind in FAMILIES and kind not in WHOLE:
        raise ValueError(
            f"model: the code of model_type {kind!r} would be decoded wrongly, as its tokens see blocks or its logits "
            f"are shifted; give its native form, load_model({getattr(config, '_name_or_path', '')!r})"
        )
    mask, sep, pad = (
        single_id(name, getattr(config, name, None)) for name in ("mask_token_id", "sep_token_id", "pad_token_id")
    )
    mask = mask if mask_token_id is None else mask_token_id
    if mask is None:
        raise ValueError(
            f"mask_token_id is needed: the config of {type(model).__name__} names none; "
            "give mask_token_id=tokenizer.mask_token_id"
        )
    stops = stop_ids or ids_of("eos_token_id", getattr(config, "eos_token_id", None))
    return MaskedLM(model, mask, stops[0] if stops else sep, pad, stop_ids=stops)


def single_id(name: str, value: Any) -> int | None:
    """An id given as such or as a list of one, as transformers allows."""
    ids = ids_of(name, value)
    if len(ids) > 1:
        raise ValueError(f"{name} must be one id, got {list(ids)}")
    return ids[0] if ids else None


def trimmed(
    result: GenerationResult,
    prompt_length: int,
    stop_ids: Sequence[int],
    pad_token_id: int | None,
    stopped: bool = False,
) -> Tensor:
    """(B, P + N) int64: sequences cut after the longest completion, padding behind a row's first end of sequence.

    ``stopped``: stop strings may have ended finished rows, too.
    """
    ends = first_stop(result.completions, stop_ids)[:, None] + 1  # (B, 1) one past a row's end of sequence
    if stopped:
        ends = torch.where(result.finished[:, None], ends.minimum(result.filled[:, None]), ends)
    index = torch.arange(result.completions.shape[1], device=ends.device)
    sequences = result.sequences.clone()
    if stop_ids or stopped:
        pad = stop_ids[0] if pad_token_id is None else pad_token_id
        sequences[:, prompt_length:].masked_fill_(index >= ends, pad)
    longest = min(int(ends.max()), len(index)) if len(ends) else 0
    return sequences[:, : prompt_length + longest]

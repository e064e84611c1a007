"""What a Sampler refuses before any work: no model, and settings that its model, policy or tokenizer do not support."""

from __future__ import annotations

from typing import Any

import torch

from unmask.policies.base import UnmaskingPolicy
from unmask.policies.heuristics import Heuristic
from unmask.sampling.canvas import check_blocks
from unmask.sampling.config import SamplerConfig
from unmask.sampling.forward import model_attention, shows_attention
from unmask.sampling.noise import check_canvases


def check_model(model: Any) -> None:
    """Raise TypeError for an object without the interface of a model."""
    wanted = ("mask_token_id", "eos_token_id", "vocab_size", "device")
    missing = [name for name in wanted if not hasattr(model, name)]
    if getattr(model, "dtype", None) == torch.float64:
        raise TypeError("model computes in float64, but logits are read in float32, bfloat16 or float16")
    if missing:
        hint = "; Sampler.from_pretrained takes a name" if isinstance(model, str) else ""
        raise TypeError(
            f"model must be a model as load_model gives it, got {type(model).__name__}, which has no "
            f"{', '.join(missing)}{hint}"
        )


def check_settings(model: Any, policy: UnmaskingPolicy, tokenizer: Any, config: SamplerConfig) -> None:
    """Raise ValueError for settings that go with none of these three."""
    kind, name = model_attention(model), type(model).__name__
    check_sampling(model, policy, tokenizer, config)
    if getattr(model, "canvas_length", None) is not None:
        check_canvases(model, policy, config)
    elif kind != "bidirectional":
        check_blocks(model, config)
        if policy.everywhere:
            raise ValueError(f"scope=all would revise blocks that {name} has finished, of which keys are kept")
    elif config.cache == "exact" or config.sub_block_length is not None:
        what = 'cache="exact"' if config.cache == "exact" else f"sub_block_length={config.sub_block_length}"
        raise ValueError(f"{what} is for models whose tokens see no later block, but {name} is bidirectional")
    elif config.cache in ("prefix", "dual") and not getattr(model, "supports_cache", False):
        split = " computed on several devices" if getattr(model, "input_device", None) is not None else ""
        text = f'cache="{config.cache}" needs a model that keeps keys and values, which {name}{split} does not'
        raise ValueError(f'{text}; use cache="none"')
    if "attention" in policy.needs and not shows_attention(model, config):
        raise ValueError(
            f"policy {policy.spec} reads attention, which only native bidirectional models show, and not "
            f'with a cache of keys: got {name} ({kind}) with cache="{config.cache}"'
        )


def check_sampling(model: Any, policy: UnmaskingPolicy, tokenizer: Any, config: SamplerConfig) -> None:
    """Raise ValueError for parameters of the sampling that would have no effect, or a wrong one."""
    config.check_draws()
    if config.cfg_scale and (model_attention(model) != "bidirectional" or config.cache in ("prefix", "dual")):
        raise ValueError(
            f"cfg_scale={config.cfg_scale} computes a second canvas whose prompt is masked, of which no keys are kept: "
            f'it needs a bidirectional model and cache="none", got {type(model).__name__} '
            f'({model_attention(model)}) with cache="{config.cache}"'
        )
    if config.stop and tokenizer is None:
        raise ValueError(f"stop={list(config.stop)} is looked for in texts, but there is no tokenizer: give one")
    if beyond := [i for i in config.stop_ids or () if i >= model.vocab_size]:
        raise ValueError(f"stop_ids has {beyond[0]}, outside the vocabulary of {model.vocab_size} tokens")
    if model.mask_token_id in (config.stop_ids or ()):
        raise ValueError(f"stop_ids has {model.mask_token_id}, which is the mask token")
    if policy.num_confidences >= model.vocab_size:
        raise ValueError(
            f"policy {policy.spec} reads {policy.num_confidences} confidences, but the model has {model.vocab_size} "
            "tokens, of which one is the mask token"
        )
    whole = getattr(model, "canvas_length", None) is not None  # which has checks of its own
    if config.cache_refresh is not None and config.cache not in ("prefix", "dual") and not whole:
        raise ValueError(f'cache_refresh={config.cache_refresh} is for cache="prefix" or "dual", got "{config.cache}"')
    if config.num_return_sequences > 1 and not draws(policy, config):
        raise ValueError(
            f"num_return_sequences={config.num_return_sequences} would all be the same: at temperature=0, "
            f"{policy.spec} draws nothing; set a temperature above 0"
        )


def draws(policy: UnmaskingPolicy, config: SamplerConfig) -> bool:
    """Whether anything is drawn, so that two completions of a prompt may differ.

    A policy of one's own may give logits, of which actions are drawn.
    """
    selects = isinstance(policy.bare, Heuristic) or policy.dial == "alpha"
    drawn = (not selects and config.actions != "greedy") or "uniform" in policy.needs
    return config.temperature > 0 or drawn

"""What the families' authors recommend for decoding: a Sampler's defaults where neither caller nor checkpoint says it.

One row per family, or per checkpoint that differs from its family. Where the authors decode one token per forward
(LLaDA, Dream), the policy is Fast-dLLM's for the same models, and ``careful`` says what the authors do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unmask.models.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Preset:
    """Settings of one family."""

    model_type: str
    models: str
    """What people call them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """SamplerConfig's fields and "policy". Block lengths of models that see blocks are the checkpoint's own."""
    source: str = ""
    careful: str = ""
    """The authors' own decoding, where that takes a forward per token."""
    named: str = ""
    """A pattern for the checkpoint's name, if this is not for the whole family."""


WHOLE = {"max_new_tokens": 256, "block_length": 32, "temperature": 0.0, "policy": "threshold:0.9"}
FAST = "Fast-dLLM's evaluation of the same models (arXiv 2505.22618)"
SDAR = {"max_new_tokens": 256, "temperature": 0.0, "policy": "threshold:0.85"}
SDAR_SOURCE = "SDAR's generate.py (threshold) and README (greedy, 256 tokens)"
LLADA2 = {"max_new_tokens": 1024, "temperature": 0.0}
LOW = "confidence:STEPS with a step per token, block length 32"

PRESETS = (
    Preset("llada", "LLaDA 1.5", WHOLE | {"block_length": 16}, f"its EVAL.md (256, 16); {FAST}", LOW, r"LLaDA-1\.5"),
    Preset("llada", "LLaDA 8B", WHOLE, FAST, LOW),
    Preset("illada", "iLLaDA", WHOLE, f"its README (decoded as LLaDA); {FAST}", LOW),
    Preset("Dream", "DiffuCoder", WHOLE, FAST, "entropy:256, full diffusion, temperature 0.2 to 0.4", "(?i)DiffuCoder"),
    Preset("Dream", "Dream 7B", WHOLE, FAST, "entropy:512, full diffusion, 512 tokens, temperature 0.2"),
    Preset("sdar", "SDAR, TraDo", SDAR, SDAR_SOURCE),
    Preset("sdar_moe", "SDAR-30B-A3B", SDAR, SDAR_SOURCE),
    Preset(
        "llada2_moe",
        "LLaDA2.1",
        LLADA2 | {"policy": "edit:0.7,0.5,16"},
        "diffusers' page of LLaDA2 (quality mode; edit:0.5,0 is the speed mode); SGLang's page (1024 tokens)",
        named=r"LLaDA2\.1",
    ),
    Preset(
        "llada2_moe",
        "LLaDA2.0",
        LLADA2 | {"policy": "threshold:0.95"},
        "its generate (threshold, temperature); SGLang's page (1024 tokens)",
    ),
    Preset(
        "Fast_dLLM_Qwen",
        "Fast-dLLM v2",
        {"max_new_tokens": 512, "temperature": 0.0, "policy": "threshold:0.9"},
        "the example of its model card",
    ),
    Preset(
        "nemotron_labs_diffusion",
        "Nemotron-Labs-Diffusion",
        {"temperature": 0.0, "policy": "threshold:0.9"},
        "its generate",
    ),
    Preset("diffusion_gemma", "DiffusionGemma", {}, "the checkpoint's generation_config.json"),
)


def full_name(name: str) -> str:
    """The whole path of a folder, also if it is named by "."; a hub id as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.is_dir() else name


def preset_of(model_type: str, name: str = "") -> Preset | None:
    """The preset of a checkpoint by its model type and name; None for a family without one."""
    fits = (p for p in PRESETS if p.model_type == model_type and re.search(p.named, name))
    return next(fits, None)


def family_defaults(model_type: str, name: str, config: TransformerConfig) -> dict[str, Any]:
    """What a Sampler does by default with a model; {} for a family without a preset.

    A model that sees blocks keeps its own block length. A buffer takes half of the context at most.
    """
    preset = preset_of(model_type, name)
    if preset is None:
        return {}
    settings = dict(preset.settings)
    if "max_new_tokens" in settings:
        settings["max_new_tokens"] = max(1, min(settings["max_new_tokens"], config.max_position_embeddings // 2))
    if config.attention != "bidirectional":
        settings |= {"block_length": config.block_length, "sub_block_length": config.sub_block_length}
    return settings

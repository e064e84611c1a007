"""What families' authors recommend is what a Sampler does by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unmask import Sampler, SamplerConfig
from unmask.models.loading import DIFFUSION_GEMMA, FAMILIES, native
from unmask.models.presets import PRESETS, preset_of
from unmask.policies.registry import make_policy
from unmask.testing import write_checkpoint


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("LLaDA-8B-Instruct", "llada", ("threshold:0.9", 256, 32)),
        ("LLaDA-1.5", "llada", ("threshold:0.9", 256, 16)),
        ("Dream-v0-Instruct-7B", "dream", ("threshold:0.9", 256, 32)),
        ("SDAR-8B-Chat-b16", "sdar", ("threshold:0.85", 256, 16)),
        ("LLaDA2.0-mini", "llada2", ("threshold:0.95", 1024, 32)),
        ("LLaDA2.1-mini", "llada2", ("threshold:0.7,edit=0.5,post=16", 1024, 32)),
        ("Fast_dLLM_v2_7B", "fast-dllm", ("threshold:0.9", 512, 32)),
    ],
)
def test_defaults_are_the_familys(name: str, kind: str, settings: tuple[Any, ...], tmp_path: Path) -> None:
    folder = str(write_checkpoint(kind, tmp_path / name, context=4096))
    sampler = Sampler.from_pretrained(folder)
    config = sampler.config
    assert (sampler.policy.spec, config.max_new_tokens, config.block_length, config.temperature) == (*settings, 0.0)
    said = Sampler.from_pretrained(folder, policy="top-k:2", config=SamplerConfig(24, 8))
    assert (said.policy.spec, said.config.max_new_tokens) == ("top-k:2", 24)


def test_a_buffer_leaves_half_of_the_context_to_the_prompt(tmp_path: Path) -> None:
    assert Sampler.from_pretrained(str(write_checkpoint("llada2", tmp_path, context=100))).config.max_new_tokens == 50


def test_the_table_is_complete_and_sound() -> None:
    assert {p.model_type for p in PRESETS} == {*FAMILIES, DIFFUSION_GEMMA} - {native.MODEL_TYPE}
    for preset in PRESETS:
        settings = dict(preset.settings)
        make_policy(settings.pop("policy", "threshold:0.9"))
        SamplerConfig(**settings)
        assert preset.source
        assert preset_of(preset.model_type) is not None, "every family has a preset for any name"
    assert preset_of("llada", "GSAI-ML/LLaDA-8B-Base").models == "LLaDA 8B"
    assert preset_of("Dream", "apple/DiffuCoder-7B-Instruct").models == "DiffuCoder"
    assert preset_of("bert") is None

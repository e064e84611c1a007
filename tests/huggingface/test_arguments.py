"""transformers' names of arguments become settings of a Sampler, or are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from unmask import SamplerConfig
from unmask.huggingface import sampler_settings


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {}),
        ({"max_new_tokens": 64, "block_length": 8}, {"max_new_tokens": 64, "block_length": 8}),
        ({"block_length": None}, {"block_length": None}),
        ({"max_length": 30}, {"max_new_tokens": 20}),
        ({"max_length": 30, "max_new_tokens": 8}, {"max_new_tokens": 8}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 1.0}, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"num_beams": 1, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_length": 0}, {}),
        (
            {"num_beams": None, "use_cache": True, "pad_token_id": 3, "logits_processor": [], "assistant_model": None},
            {},
        ),
        ({"seed": 3, "alpha": 2.0, "policy_scale": 1.5}, {"seed": 3, "alpha": 2.0, "policy_scale": 1.5}),
    ],
)
def test_what_has_a_meaning_is_translated(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = sampler_settings(arguments, prompt_length=10)
    assert settings == expected
    SamplerConfig(max_new_tokens=64, block_length=4).updated(settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, r"num_beams=4 has no meaning"),
        ({"top_k": 50}, r"top_k=50 has no meaning"),
        ({"top_p": 0.9}, r"top_p=0.9 has no meaning"),
        ({"repetition_penalty": 1.2}, r"repetition_penalty=1.2 has no meaning"),
        ({"stop_strings": ["\n"]}, r"stop_strings=\['\\n'\] has no meaning"),
        ({"output_scores": True}, r"output_scores=True has no meaning"),
        ({"blok_length": 8}, r"blok_length=8 has no meaning.*block_length"),
        ({"temperature": 0.7}, r"temperature=0.7 has no effect without do_sample=True, got do_sample=None"),
        ({"temperature": 0.7, "do_sample": False}, r"temperature=0.7 .* got do_sample=False"),
        ({"max_length": 10}, r"max_length=10 counts the prompt, whose 10 tokens leave no room"),
        ({"max_length": 2.5}, "max_length must be an integer, got 2.5"),
    ],
)
def test_what_has_none_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_settings(arguments, prompt_length=10)

"""The upstream implementation's generations, token for token and step for step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from unmask import Sampler, SamplerConfig, load_model

FOLDER = Path(__file__).parent.parent / "golden" / "llada-tiny"
SETTINGS = {  # setting of the golden file: policy, block length
    "thr0.12_bl8": ("threshold:0.12", 8),
    "thr0.08_bl32": ("threshold:0.08", 32),
    "low_s32_bl8": ("confidence:32", 8),
    "low_s8_bl32": ("confidence:8", 32),
}
GOLDEN = json.loads((FOLDER / "golden_generate.json").read_text())


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_reproduces_upstream(name: str) -> None:
    expected = GOLDEN[name]
    policy, block_length = SETTINGS[name.split("/")[1]]
    config = SamplerConfig(max_new_tokens=32, block_length=block_length, stop_at_eos=False)
    out = Sampler(load_model(str(FOLDER)), policy=policy, config=config).generate([expected["prompt"]])
    assert out.completions[0].tolist() == expected["out"]
    assert out.steps[0].item() == expected["steps"]


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_batch_of_all_prompts_gives_the_same(setting: str) -> None:
    cases = [case for name, case in sorted(GOLDEN.items()) if name.endswith(setting)]
    policy, block_length = SETTINGS[setting]
    config = SamplerConfig(max_new_tokens=32, block_length=block_length, stop_at_eos=False)
    out = Sampler(load_model(str(FOLDER)), policy=policy, config=config).generate([case["prompt"] for case in cases])
    assert out.completions.tolist() == [case["out"] for case in cases]
    assert out.steps.tolist() == [case["steps"] for case in cases]

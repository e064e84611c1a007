"""A thousand generations leave nothing behind."""

from __future__ import annotations

import json
import sys

import pytest
from fresh_process import run_python

BOUND = 4 * 2**20
"""Bytes; a canvas of the test is 10 KB, so that one left behind by each of 1000 generations makes 10 MB."""

CODE = """
import json, os
import torch
from unmask.models.transformer import Transformer, TransformerConfig
from unmask.sampling import Sampler, SamplerConfig

torch.set_num_threads(1)
torch.manual_seed(0)
model = Transformer(TransformerConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, mask_token_id=2, eos_token_id=1,
)).eval()
config = SamplerConfig(max_new_tokens=120, block_length=None, max_steps=1)
sampler = Sampler(model, None, "threshold:0.9", config)
prompts = torch.randint(3, 40, (8, 8))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

def grown(keep):
    before = resident()
    for _ in range(1000):
        result = sampler.generate(prompts)
        if keep is not None:
            keep.append(result.sequences.clone())
    return resident() - before

for _ in range(200):
    sampler.generate(prompts)
print(json.dumps({"clean": grown(None), "leaking": grown([])}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_generations_leave_nothing_behind() -> None:
    run = run_python(CODE)
    assert run.returncode == 0, run.stderr
    grown = json.loads(run.stdout)
    print(grown)
    assert grown["clean"] < BOUND
    assert grown["leaking"] > 1.5 * BOUND, "the measurement would not see a leak"

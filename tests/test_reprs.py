"""What objects say of themselves in a shell: short, and what one wants to know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, TrainerConfig, evaluate
from unmask.policies import make_policy
from unmask.policies.calibration import Curve
from unmask.policies.config import SetPolicyConfig
from unmask.policies.registry import as_policy
from unmask.policies.set_policy import SetPolicy
from unmask.tasks import Hops


class Mine:
    def decide(self, observation: Any) -> Any: ...


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (SamplerConfig(), "SamplerConfig()"),
        (SamplerConfig(24, None, seed=0), "SamplerConfig(max_new_tokens=24, block_length=None, seed=0)"),
        (TrainerConfig(expert="threshold:0.9"), "TrainerConfig(expert='threshold:0.9')"),
        (SetPolicyConfig(vocab_size=40), "SetPolicyConfig(vocab_size=40)"),
        (
            Curve(24, 0, 0.0, "hold-eos", "", (0.0, 3.0), (8.5, 4.25)),
            "Curve(max_new_tokens=24, full diffusion, temperature=0, hold-eos: NFE 4.25 to 8.50)",
        ),
        (make_policy("klass:0.9,0.01"), "Klass('klass:0.9,0.01')"),
        (make_policy("edit:0.9,0.8,hold-eos"), "Threshold('threshold:0.9') with hold-eos,edit=0.8"),
        (as_policy(Mine()), "Adapted('Mine')"),
        (
            Policy(PolicyConfig(num_confidences=4, context="block", zero_time=True)),
            "Policy fresh: 331,649 parameters, reads 4 confidences, mask of the active block; PolicyConfig(",
        ),
        (
            make_policy("tiny,window=8"),
            "Policy from tiny: 92,097 parameters, reads 1 confidence, mask, time, alpha of ",
        ),
        (SetPolicy(SetPolicyConfig(vocab_size=40)), "SetPolicy fresh: 109,761 parameters, reads 5 confidences, "),
    ],
)
def test_configurations_and_policies(value: Any, text: str) -> None:
    assert repr(value).startswith(text)
    assert len(repr(value)) < 400
    assert "\n" not in repr(value)


def test_a_learned_policy_knows_where_it_is_from(tmp_path: Path) -> None:
    Policy(PolicyConfig()).save_pretrained(tmp_path)
    policy = Policy.from_pretrained(tmp_path)
    assert policy.spec == str(tmp_path)
    assert make_policy(f"{tmp_path},hold-eos").spec == f"{tmp_path},hold-eos"
    assert repr(policy).startswith(f"Policy from {tmp_path}: ")
    assert Policy().spec == "Policy"


def test_sampler_and_results() -> None:
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9", config=SamplerConfig(24, 8, seed=0))
    assert repr(sampler).splitlines() == [
        "Sampler of Transformer (0.7 M parameters, float32, cpu)",
        "  policy: Threshold('threshold:0.9')",
        "  config: SamplerConfig(max_new_tokens=24, block_length=8, seed=0)",
    ]
    result = sampler.generate("bC:a=", record=True)
    assert repr(result).startswith("GenerationResult(1 x 24 tokens, 1 finished, NFE ")
    steps = int(result.steps[0])
    assert repr(result.trajectory).startswith(f"Trajectory(1 rows, at most {steps} steps, 24 positions, ")
    events = [repr(event) for event in sampler.stream("bC:a=")]
    assert events[0] == "StreamEvent(row 0, step 1: [2])"
    assert events[-1].endswith("], finished)")
    row = evaluate(sampler, Hops(), 2)
    assert repr(row).startswith("Evaluation(threshold:0.9 on hops, blocks of 8: accuracy ")
    assert repr(row).endswith(" 2 problems)")

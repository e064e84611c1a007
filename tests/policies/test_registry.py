"""Policies by name: rules with their numbers, learned ones by their folder."""

from __future__ import annotations

from typing import Any

import pytest

from unmask.policies import HEURISTICS, make_policy


@pytest.mark.parametrize("spec", [rule.example() for rule in HEURISTICS.values()])
def test_names_round_trip(spec: str) -> None:
    policy = make_policy(spec)
    assert make_policy(policy.spec).spec == policy.spec
    assert type(policy) is HEURISTICS[spec.partition(":")[0]]
    assert len(policy.describe()) > 20
    assert policy.usage().startswith(policy.name)  # type: ignore[attr-defined]


WRONG = [
    ("treshold:0.9", "Did you mean threshold:0.9.*entropy-bound:GAMMA"),
    ("litle", "Did you mean little"),
    ("little,hold_eos", "Did you mean hold-eos"),
    ("greedy", "unknown policy 'greedy'.*Known are random:STEPS"),
    ("", "unknown policy ''"),
    ("threshold", r"threshold takes threshold:LAMBDA\[,LEAST\], for instance threshold:0.9"),
    ("threshold:", "threshold takes"),
    ("threshold:0.9,0.1", "threshold: LEAST must be a whole number >= 1, got 0.1"),
    ("threshold:0.9,1,1", r"threshold takes threshold:LAMBDA.*got \[0.9, 1.0, 1.0\]"),
    ("threshold:high", "'high' is not a number"),
    ("threshold:1.5", "threshold: LAMBDA must be a number from 0 to 1, got 1.5"),
    ("threshold:nan", "threshold: LAMBDA must be .* got nan"),
    ("confidence:2.5", "confidence: STEPS must be a whole number >= 1, got 2.5"),
    ("random:0", "random: STEPS must be a whole number >= 1, got 0"),
    ("top-k:3000000000", r"top-k: K must be less than 2\*\*31, got 3000000000"),
    ("threshold:0.9,2147483648", r"threshold: LEAST must be less than 2\*\*31, got 2147483648"),
    ("factor:-1", "factor: F must be a number >= 0, got -1"),
    ("entropy-bound:inf", "entropy-bound: GAMMA must be a number >= 0, got inf"),
    ("klass:0.9,0.01,2", r"klass takes klass:CONF\[,KL\]"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG)
def test_wrong_names_and_numbers(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(spec)


def test_other_names_are_learned_policies(tmp_path: Any) -> None:
    from unmask.policies import Policy, PolicyConfig

    Policy(PolicyConfig(hidden_size=32, num_heads=2, ffn_size=32)).save_pretrained(tmp_path / "mine")
    assert isinstance(make_policy(str(tmp_path / "mine")), Policy)
    with pytest.raises(FileNotFoundError):
        make_policy(str(tmp_path / "absent"))


def test_a_rule_is_known_by_its_name_once_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.policies import heuristics

    monkeypatch.setattr(heuristics, "HEURISTICS", dict(HEURISTICS))

    class Later(heuristics.Threshold):
        """Every position less probable than LAMBDA."""

        name = "later"

    assert heuristics.HEURISTICS["later"] is Later
    assert set(heuristics.HEURISTICS) - set(HEURISTICS) == {"later"}
    assert Later(0.5).spec == "later:0.5"

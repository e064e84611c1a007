"""Forwards asked for: curves of forwards over a policy's dial, how they are measured, looked up and kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Policy, Sampler, SamplerConfig
from unmask.cli import main
from unmask.cli.options import progress_bar
from unmask.evaluation import calibrate
from unmask.policies import PolicyConfig, SetPolicy, SetPolicyConfig
from unmask.policies.base import Decision, Observation
from unmask.policies.calibration import RANGES, Curve, calibrated
from unmask.policies.options import Options, with_options
from unmask.sampling.dials import dial_for
from unmask.tasks import make_task

SETTING: dict[str, Any] = {"max_new_tokens": 24, "block_length": 0, "temperature": 0.0, "options": "", "drawing": ""}
FULL: dict[str, Any] = {"max_new_tokens": 24, "block_length": None, "seed": 0}
SMALL = SetPolicyConfig(vocab_size=38, hidden_size=16, num_layers=1, ffn_size=16)


def curve(dial: tuple[float, ...], nfe: tuple[float, ...], **other: Any) -> Curve:
    return Curve(**{**SETTING, **other}, dial=dial, nfe=nfe)


@pytest.mark.parametrize(
    ("dial", "nfe", "target", "expected"),
    [
        ((0.01, 0.1, 1.0), (8.0, 6.0, 4.0), 8, 0.01),
        ((0.01, 0.1, 1.0), (8.0, 6.0, 4.0), 4, 1.0),
        ((0.01, 0.1, 1.0), (8.0, 6.0, 4.0), 6, 0.1),
        ((0.01, 0.1, 1.0), (8.0, 6.0, 4.0), 5, math.sqrt(0.1)),
        ((-2.0, 0.0, 2.0), (8.0, 6.0, 4.0), 7.5, -1.5),
        ((-2.0, 0.0, 2.0), (8.0, 8.5, 4.0), 6, 1.0),  # noise lifted the second
    ],
)
def test_the_dial_between_two_values(
    dial: tuple[float, ...], nfe: tuple[float, ...], target: float, expected: float
) -> None:
    assert curve(dial, nfe).at(target) == pytest.approx(expected)


def test_values_go_where_least_is_known() -> None:
    """Not all of them to a cliff; distances of risks are those of their logarithms."""
    assert calibrate.gap(((-8.0, 7.7), (0.0, 5.9))) > calibrate.gap(((-9.75, 13.0), (-9.5, 8.7)))
    assert calibrate.gap(((0.0, 8.0), (1.0, 4.0))) > calibrate.gap(((1.0, 8.0), (2.0, 5.0)))
    assert calibrate.gap(((0.01, 8.0), (0.1, 4.0))) == pytest.approx(calibrate.gap(((0.1, 8.0), (1.0, 4.0))))


def test_what_cannot_be_met_is_named() -> None:
    policy = SetPolicy(SMALL)
    config = SamplerConfig(max_new_tokens=24, block_length=None, target_nfe=5.0)
    with pytest.raises(ValueError, match=r"target_nfe=9 is out of the policy's range, 4.00 to 8.00 at max_new_"):
        curve((0.1, 1.0), (8.0, 4.0)).at(9)
    with pytest.raises(ValueError, match="ascending"):
        curve((1.0, 0.1), (8.0, 4.0))
    with pytest.raises(ValueError, match=r"calibrated for nothing: run `unmask calibrate`"):
        dial_for(policy, config)
    policy.config = calibrated(policy.config, (curve((0.1, 1.0), (8.0, 4.0)),))
    assert dial_for(policy, config) == pytest.approx(10 ** (-1 + 3 / 4))
    assert dial_for(policy, config.updated({"block_length": 32})) == dial_for(policy, config)  # one block as well
    for other, named in (
        ({"block_length": 8}, "block_length=8"),
        ({"temperature": 0.5}, "temperature=0.5"),
        ({"max_new_tokens": 48}, "max_new_tokens=48"),
    ):
        with pytest.raises(ValueError, match=f"forwards at .*{named}.*calibrated for max_new_tokens=24, full"):
            dial_for(policy, config.updated(other))
    with pytest.raises(ValueError, match="temperature=0, hold-eos, but"):
        dial_for(with_options(policy, Options(hold_eos=True)), config)
    with pytest.raises(ValueError, match="give target_nfe=5 or alpha=0.1, not both"):
        dial_for(policy, config.updated({"alpha": 0.1}))
    with pytest.raises(ValueError, match=r"cfg_scale=0.5 changes the forwards, and no curve of target_nfe tells how"):
        dial_for(policy, config.updated({"cfg_scale": 0.5}))
    with pytest.raises(ValueError, match=r"stop=\('#',\) changes the forwards"):
        calibrate.measure_curve(Sampler.from_pretrained("tiny"), ["aB:a="], {"stop": "#"})
    with pytest.raises(ValueError, match=r"target_nfe=5 is for learned policies, but threshold:0.9 is a rule"):
        Sampler.from_pretrained("tiny", "threshold:0.9").generate("aB:a=", target_nfe=5)
    with pytest.raises(ValueError, match="target_nfe does not apply to infill"):
        Sampler.from_pretrained("tiny").infill(torch.zeros((1, 4), dtype=torch.int64), target_nfe=5)


@pytest.mark.parametrize("kind", ["set", "single"])
def test_targets_are_met_on_other_prompts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 6)
    task = make_task("hops")
    known, fresh = ([p.prompt for p in task.problems(64, seed)] for seed in (1, 2))
    torch.manual_seed(0)
    policy = SetPolicy(SMALL) if kind == "set" else Policy(PolicyConfig(hidden_size=16, ffn_size=16))
    held = with_options(policy, Options(hold_eos=True))
    sampler = Sampler.from_pretrained("tiny", held)
    found = calibrate.measure_curve(sampler, known, FULL)
    assert found.falling[0] > 1.5 * found.falling[-1]
    bare: Any = policy
    bare.config = calibrated(bare.config, (found,))
    bare.save_pretrained(tmp_path)
    again = Sampler.from_pretrained("tiny", f"{tmp_path},hold-eos")
    assert dict(again.policy.bare.config.to_dict()) == dict(bare.config.to_dict())  # type: ignore[attr-defined]
    low, high = found.falling[-1], found.falling[0]
    target = low + 0.6 * (high - low)
    result = again.generate(fresh, **FULL, target_nfe=target)
    assert result.steps.float().mean().item() == pytest.approx(target, rel=0.08)
    alone = again.generate(fresh[7:8], **FULL, target_nfe=target)
    if kind == "set":  # the other draws by the row's number
        assert torch.equal(alone.completions[0], result.completions[7])


def test_a_shift_is_added_to_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy.from_pretrained("tiny")
    policy.config = calibrated(
        policy.config,
        (curve((-1.5, 1.5), (9.0, 3.0), drawing="bernoulli-argmax, tau=1, beta=1, alpha=1"),),
    )
    seen, decide = [], policy.decide

    def watched(observation: Observation) -> Decision:
        plain = decide(replace(observation, shift=None)).logits
        seen.append((plain, decide(observation).logits))
        return decide(observation)

    monkeypatch.setattr(policy, "decide", watched)
    Sampler.from_pretrained("tiny", policy).generate("aB:a=", **FULL, target_nfe=8.0)
    assert seen
    assert all(torch.equal(moved, plain - 1.0) for plain, moved in seen)


def test_calibrating_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 2)
    SetPolicy(SMALL).save_pretrained(tmp_path / "set")
    there = ["--model", "tiny", "--task", "hops"]
    setting = [*there, "--max-new-tokens", "24", "--block-length", "full"]
    assert main(["calibrate", f"{tmp_path}/set,hold-eos", "--count", "4", *setting]) == 0
    text = capsys.readouterr().out
    assert "max_new_tokens=24, full diffusion, temperature=0, hold-eos, 4 prompts of hops on tiny" in text
    [found] = SetPolicy.from_pretrained(tmp_path / "set").config.calibration
    assert found.dial == RANGES["alpha"]
    target = f"{sum(found.nfe) / 2:.2f}"
    asked = ["--policies", f"s={tmp_path}/set,hold-eos", "--targets", target, "--regimes", "full", "--problems", "4"]
    assert main(["evaluate", *there, *asked]) == 0
    shown = capsys.readouterr().out
    assert f"{found.at(float(target)):g}" in shown.splitlines()[2]
    for words, message in (
        (["calibrate", "tiny"], "--output is needed"),
        (["calibrate", "threshold:0.9"], "is a rule"),
        (["evaluate", "--policies", "threshold:0.9", "--targets", "5"], "none of the policies is learned"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_stopped_calibration_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 6)
    torch.manual_seed(0)
    policy = SetPolicy(SMALL)
    for name in ("whole", "stopped"):
        policy.save_pretrained(tmp_path / name)
    asked = ["--model", "tiny", "--task", "hops", "--count", "4", "--max-new-tokens", "24", "--block-length", "full"]
    assert main(["calibrate", str(tmp_path / "whole"), *asked]) == 0
    [expected] = SetPolicy.from_pretrained(tmp_path / "whole").config.calibration
    steps, calls = Sampler.steps, []

    def counted(self: Sampler, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return steps(self, *args)

    monkeypatch.setattr(Sampler, "steps", counted)
    assert main(["calibrate", str(tmp_path / "stopped"), *asked]) == 130
    notes = tmp_path / "stopped" / ".calibration.jsonl"
    assert len(notes.read_text().splitlines()) == 1 + 3
    assert main(["calibrate", str(tmp_path / "stopped"), *asked]) == 0
    assert len(calls) == 4 + 3
    assert SetPolicy.from_pretrained(tmp_path / "stopped").config.calibration == (expected,)
    assert not notes.exists()

    calls.clear()  # notes of other prompts are of no use
    assert main(["calibrate", str(tmp_path / "stopped"), *asked]) == 130
    assert main(["calibrate", str(tmp_path / "stopped"), *asked, "--seed-problems", "5"]) == 0
    assert len(calls) == 4 + 6
    capsys.readouterr()


def test_progress_without_a_terminal_is_a_line_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr("unmask.cli.options.time.monotonic", lambda: now[0])
    with progress_bar() as progress:
        bar = progress.add_task("calibrating", total=24)
        for _ in range(4):
            now[0] += 25
            progress.advance(bar)
    assert capsys.readouterr().err.split() == ["calibrating", "3/24", "after", "1:15"]

"""Policies learn from careful decodes: labels against brute force, exact resumption, prompts of a file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import KINDS, SUPERVISED, Killed, assert_same_policy, kill_after_3, lines, tiny

from unmask import Sampler
from unmask.evaluation import calibrate
from unmask.files import locked
from unmask.policies import Policy, PolicyConfig, load_policy
from unmask.tasks import make_task
from unmask.training import labels as labelling
from unmask.training.config_files import find_config, packaged_configs
from unmask.training.metrics import METRICS
from unmask.training.record import told
from unmask.training.supervised import DistillTrainer, Prompts, SupervisedTrainer
from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig

LENGTH = 24
PROMPT = "cEaCfBeGgD:a="
BOTH = pytest.mark.parametrize("kind", KINDS)


def make_trainer(folder: Path, kind: str = "set", model: Any = None, **changes: Any) -> SupervisedTrainer:
    packaged, tokenizer = tiny()
    trainer, config = KINDS[kind]
    settings = config.from_dict({**SUPERVISED, "output_dir": str(folder), **changes})
    made: SupervisedTrainer = trainer(settings, model=model or packaged, tokenizer=tokenizer)
    return made


@torch.no_grad()
def proposals(prompt: list[int], buffer: list[int]) -> tuple[Tensor, Tensor]:
    """The most probable tokens (L,) and their probabilities."""
    model, _ = tiny()
    logits = model(torch.tensor([prompt + buffer]))[0, len(prompt) :].float()
    logits[:, model.mask_token_id] = -torch.inf
    p, token = logits.softmax(-1).max(-1)
    return token, p


def finished(prompt: list[int], buffer: list[int], block: range) -> list[int]:
    """``buffer`` decoded within ``block`` by threshold 0.9 with hold-eos, written out for one row."""
    model, _ = tiny()
    mask, eos, buffer = model.mask_token_id, model.eos_token_id, list(buffer)
    while True:
        masked = [i for i in block if buffer[i] == mask]
        ended = eos in buffer and mask not in buffer[: buffer.index(eos)]
        if not masked or ended:
            return buffer
        token, p = proposals(prompt, buffer)
        held = [i for i in masked if p[i] > 0.9] or [max(masked, key=lambda i: float(p[i]))]
        picked = [i for i in held if token[i] != eos or all(j in held for j in masked if j < i)]
        if not picked:
            free = [i for i in masked if token[i] != eos or i == masked[0]]
            picked = [max(free, key=lambda i: float(p[i]))]
        for i in picked:
            buffer[i] = int(token[i])


@pytest.mark.parametrize("block_length", [LENGTH, 8])
@pytest.mark.parametrize("iteration", [0, 1])
@pytest.mark.parametrize("labels", ["survival", "agreement"])
@BOTH
def test_labels_are_those_of_a_careful_decode(
    kind: str, labels: str, iteration: int, block_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, kind, block_length=block_length, labels=labels)
    model, tokenizer = tiny()
    prompt, eos, mask = tokenizer.encode(PROMPT), model.eos_token_id, model.mask_token_id
    gone_on, finish = [], labelling.finish

    def watched(sampler: Any, tokens: Tensor, attention: Any, start: int, config: Any) -> Tensor:
        gone_on.extend(tokens[:, start:].tolist())
        return finish(sampler, tokens, attention, start, config)

    monkeypatch.setattr(labelling, "finish", watched)
    tried, numbers = trainer.collectors[0].collect([prompt] * 6, iteration)
    assert ("own_nfe" in numbers) == (iteration == 1)
    assert numbers["states"] == len(tried.picked) > 12
    assert not (tried.picked & tried.valid).any()
    assert bool(tried.picked.any()) == (kind == "set" or labels == "survival")
    careful = [mask] * LENGTH
    for start in range(0, LENGTH, block_length):
        careful = finished(prompt, careful, range(start, start + block_length))
    text = [eos if token == mask else token for token in careful]  # what is masked to the end is as good as an end
    for n in range(0, len(tried.picked), max(1, len(tried.picked) // 12)):
        valid, picked = (t[n].nonzero().flatten().tolist() for t in (tried.valid, tried.picked))
        start = valid[0] - valid[0] % block_length
        assert all(start <= i < start + block_length for i in valid + picked)
        left = (tried.inputs.mask & ~tried.picked)[n].tolist()
        buffer = gone_on[n] if gone_on else [mask if m else t for m, t in zip(left, text, strict=True)]
        final = finished(prompt, buffer, range(start, start + block_length)) if gone_on else text
        token, p = proposals(prompt, [mask if i in picked else t for i, t in enumerate(buffer)])
        assert all(buffer[i] == token[i] for i in picked)
        sign = torch.where(token == eos, -1.0, 1.0) if kind == "distill" else 1.0
        seen = tried.inputs.confidence[n, :, 0] if kind == "distill" else tried.inputs.probability[n]
        assert torch.allclose(seen[valid], (sign * p)[valid], atol=1e-3)
        for i in valid:
            assert bool(tried.survived[n, i]) == (token[i] == (eos if final[i] == mask else final[i])), (n, i)
    assert 0.1 < tried.survived[tried.valid].float().mean() < 0.99


@BOTH
def test_a_killed_run_goes_on_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 3)
    settings: dict[str, Any] = {"calibration_prompts": 4, "block_length": [8, "full"], "policy": SUPERVISED["policy"]}
    if kind == "distill":
        settings["policy"] = {**SUPERVISED["policy"], "context": "block", "num_confidences": 2}
    whole = make_trainer(tmp_path / "whole", kind, **settings)
    whole.train()

    parts = tmp_path / "parts"
    with pytest.raises(Killed):
        make_trainer(parts, kind, **settings).train(kill_after_3)
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-000002\)"):
        make_trainer(parts, kind, **settings)
    with pytest.raises(ValueError, match="extra 6 there, 5 here"):
        make_trainer(parts, kind, **settings, extra=5, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="is of another kind of run: "):
        make_trainer(parts, {"set": "distill", "distill": "set"}[kind], resume_from_checkpoint=True)
    resumed = make_trainer(parts, kind, **settings, resume_from_checkpoint=True)
    with locked(parts / METRICS), pytest.raises(BlockingIOError, match="by another process"):
        resumed.train()
    resumed.train()
    assert_same_policy(tmp_path / "whole" / "policy", parts / "policy")
    rows = [[(row["step"], row["loss"]) for row in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [1, 2, 3, 4]
    policy: Any = load_policy(parts / "policy")
    assert policy.config == whole.policy.config
    assert {curve.setting for curve in policy.config.calibration} == {
        f"max_new_tokens=24, {blocks}, temperature=0{options}{drawing}"
        for blocks in ("block_length=8", "full diffusion")
        for options in ("", ", hold-eos")
        for drawing in ("" if kind == "set" else ", greedy",)
    }
    assert policy.decoding == {"actions": "greedy", "block_length": 8}
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, policy)
    asked = {"max_new_tokens": LENGTH, "block_length": 8, "target_nfe": policy.config.calibration[0].nfe[1]}
    steps = [sampler.generate(PROMPT, **asked).steps.item() for _ in range(2)]
    assert steps[0] == steps[1] <= LENGTH
    training, base = told(parts / "policy", None, None)
    assert (training["careful"], training["iteration"], base) == ("threshold:0.9,hold-eos", 4, None)


@pytest.mark.parametrize(("averaged", "rounds"), [(0, 1), (0.5, 2), (0.8, 3), (1, 4)])
def test_the_finished_policy_is_a_mean_of_the_last_ones(averaged: float, rounds: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, averaged=averaged)
    after: list[dict[str, Tensor]] = []
    policy = trainer.train(
        lambda *_: after.append({n: p.detach().clone() for n, p in trainer.policy.named_parameters()})
    )
    for name, p in policy.named_parameters():
        mean = torch.stack([weights[name].double() for weights in after[-rounds:]]).mean(0)
        assert torch.allclose(p.double(), mean, atol=1e-6), name
    saved = load_policy(tmp_path / "policy")
    assert all(a.equal(b) for a, b in zip(saved.parameters(), policy.parameters(), strict=True))


@BOTH
def test_it_learns(kind: str, tmp_path: Path) -> None:
    """The network soon tells better than the model's own probabilities what survives."""
    changes = {"num_prompts": 12, "minibatch_size": 24, "num_iterations": 4, "kept_iterations": 12, "iterations": 20}
    trainer = make_trainer(tmp_path, kind, policy={}, **changes)
    values = [trainer.step() for _ in range(5)]
    share = {"set": 0.85, "distill": 0.95}[kind]  # a policy of single positions does not see tokens
    assert values[-1]["loss"] < share * values[-1]["model_loss"]


@BOTH
def test_undefined_logits_end_a_run(kind: str, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny()[0])
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(FloatingPointError, match="logits were undefined"):
        make_trainer(tmp_path, kind, model).train()


def test_prompts_of_a_file(tmp_path: Path) -> None:
    texts = [f"{c}E{c.upper()}f:{c}=" for c in "abcde"]
    (tmp_path / "p.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    streams = [make_trainer(tmp_path / s, prompts=str(tmp_path / f"p.{s}")).prompts for s in ("txt", "jsonl")]
    first = streams[0].take(0, 10)
    assert first == streams[1].take(0, 4) + streams[1].take(4, 6)
    assert sorted(first[:5]) == sorted(first[5:]) == texts
    assert first[:5] != first[5:]
    trainer = make_trainer(
        tmp_path / "run", prompts=str(tmp_path / "p.txt"), max_completion_length=[6, 9], iterations=1
    )
    trainer.train()
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    for name, message in (("none.txt", "has none"), ("bad.jsonl", 'JSON object with a "prompt"')):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path / "x", prompts=str(tmp_path / name))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("set", {"careful": "mine"}, "careful must be a rule with its numbers, got 'mine'"),
        ("set", {"careful": "threshold:0.9,edit=0.5"}, "careful must not revise tokens"),
        ("set", {"policy": {"vocab_size": 3}}, "policy: vocab_size cannot be chosen"),
        ("set", {"policy": {"sure": 1.5}}, "policy: sure must be less than 1, got 1.5"),
        ("set", {"risks": [0.0, 1.0]}, "risks must be positive"),
        ("set", {"temperature": -1}, "temperature must be at least 0 or a list, got -1"),
        ("set", {"init_policy": "a"}, "init_policy='a' has its own shape"),
        ("set", {"labels": "mine"}, "labels must be 'survival', 'agreement' or 'answer', got 'mine'"),
        ("distill", {"policy": {"alpha_conditioned": True}}, "policy: alpha_conditioned cannot be chosen; hidden_size"),
        ("distill", {"policy": {"time": "late"}}, "policy: time must be 'steps' or 'share', got 'late'"),
        ("distill", {"thresholds": [0.0, 0.5]}, r"thresholds must be between 0 and 1, got \(0.0, 0.5\)"),
        ("distill", {"risks": [0.1, 0.5]}, r"unknown DistillTrainerConfig fields \['risks'\]"),
    ],
)
def test_what_a_run_does_not_take(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        KINDS[kind][1].from_dict({**SUPERVISED, **changes})


def test_policies_that_cannot_be_distilled_to(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    config = DistillTrainerConfig.from_dict({**SUPERVISED, "output_dir": str(tmp_path)})
    with pytest.raises(TypeError, match="policy must be a Policy, got SetPolicy"):
        DistillTrainer(config, model, tokenizer, policy=make_trainer(tmp_path / "set").policy)
    with pytest.raises(ValueError, match="conditioned on alpha, which these labels do not depend on"):
        DistillTrainer(config, model, tokenizer, policy=Policy(PolicyConfig(alpha_conditioned=True)))
    make_trainer(tmp_path / "set").policy.save_pretrained(tmp_path / "sets")
    with pytest.raises(ValueError, match="model_type must be 'unmask-policy'"):
        make_trainer(tmp_path / "x", "distill", policy={}, init_policy=str(tmp_path / "sets"))


def test_a_policy_of_other_training_learns_further(tmp_path: Path) -> None:
    """It keeps its inputs, and says how it is decoded from now on."""
    Policy(PolicyConfig(hidden_size=16, ffn_size=16, trained_actions="dpls", trained_block_length=8)).save_pretrained(
        tmp_path / "old"
    )
    trainer = make_trainer(tmp_path / "run", "distill", policy={}, init_policy=str(tmp_path / "old"), iterations=1)
    policy = trainer.train()
    assert policy.decoding == {"actions": "greedy", "block_length": None}
    assert (policy.config.time, policy.config.marks_ends) == ("steps", False)
    fresh = make_trainer(tmp_path / "fresh", "distill").policy.config
    assert (fresh.time, fresh.marks_ends, fresh.trained_block_length) == ("share", True, 0)


@pytest.mark.parametrize(
    ("blocks", "usual"), [([8], 8), ([None, None, 16, 32], 0), ([8, 16, 16], 16), ([16, 8], 16), (["full", 8], 0)]
)
def test_most_rounds_decide_how_a_policy_is_decoded(blocks: list[Any], usual: int) -> None:
    config = SetTrainerConfig.from_dict({**SUPERVISED, "block_length": blocks})
    assert config.noted["trained_block_length"] == usual


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in packaged_configs(KINDS[k][1].FOLDER)])
def test_packaged_configurations_are_valid(kind: str, name: str) -> None:
    config = KINDS[kind][1]
    assert find_config(name, config.FOLDER).read_text().startswith("# ")
    assert config.from_yaml(name).iterations > 10


def test_learning_rates() -> None:
    config = SetTrainerConfig.from_dict({**SUPERVISED, "iterations": 20})
    assert [round(config.pace(i), 4) for i in (0, 1, 2, 10, 19)] == [0.3333, 0.6350, 0.9050, 0.525, 0.0975]


def test_own_decodes_are_at_all_values_of_the_dial() -> None:
    share = torch.tensor([0.0, 0.5, 1.0])
    risks = SetTrainerConfig(risks=(0.01, 1.0)).dials(share)
    assert torch.allclose(risks, torch.tensor([0.01, 0.1, 1.0]))
    shifts = DistillTrainerConfig(thresholds=(0.2, 0.8)).dials(share)
    assert torch.allclose((-shifts).sigmoid(), torch.tensor([0.2, 0.5, 0.8]))


def test_sets_hold_what_is_certain(tmp_path: Path) -> None:
    """Sets of careful decodes: all above 0.97, and at most ``extra`` more, of those allowed."""
    trainer = make_trainer(tmp_path, extra=2)
    o = observed(64)
    sets = trainer.collectors[0].sets(o, torch.Generator().manual_seed(1), learned=False)
    certain = o.allowed & (o.token_confidence > 0.97)
    assert (sets & certain).equal(certain)
    assert not (sets & ~o.allowed).any()
    extra = (sets & ~certain).sum(dim=1)
    assert sorted(set(extra.tolist())) == [0, 1, 2]


def observed(rows: int) -> Any:
    from unmask.policies import Observation

    p: Tensor = torch.rand(rows, LENGTH).pow(0.1)
    allowed = torch.rand(rows, LENGTH) < 0.8
    zeros = torch.zeros(rows, LENGTH, dtype=torch.int64)
    return Observation(allowed, allowed, p[..., None], zeros, p, zeros[:, 0], LENGTH, LENGTH, tokens=zeros)


def test_each_setting_is_calibrated_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, temperature=[0, 0, 0.5], block_length=["full", "full"], calibration_prompts=2)
    trainer.calibrate(2)
    settings = [curve.setting for curve in trainer.policy.config.calibration]
    assert len(settings) == len(set(settings)) == 4


def test_a_run_with_nothing_to_learn_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.collectors[0].collect = lambda *_: (SimpleNamespace(turn=torch.zeros(0, LENGTH)), {})  # type: ignore[method-assign, assignment, return-value]
    with pytest.raises(ValueError, match="nothing to learn: every prompt is decoded in one forward"):
        trainer.train()


def test_the_source_of_prompts_is_theirs() -> None:
    assert Prompts(SetTrainerConfig(), make_task("sums")).source == "sums"

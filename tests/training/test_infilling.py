"""Problems that carry ids with holes: decoded as by Sampler.infill, graded by their ids, and trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from infill_task import MASK, Gapped
from training_helpers import KINDS, SUPERVISED, Killed, assert_same_policy, kill_after_3, lines, make_config, tiny

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, evaluate
from unmask.cli import main
from unmask.evaluation import calibrate
from unmask.evaluation.evaluate import decode_problems
from unmask.policies import load_policy
from unmask.sampling.infill import complete
from unmask.tasks import Hops, Problem, make_task
from unmask.tasks.mixture import mixture
from unmask.training import Trainer
from unmask.training.rewards import multiplicative
from unmask.training.rollout import Collector

LENGTH = 40
CHANGED = {"max_completion_length": LENGTH, "careful": "threshold:0.9", "minibatch_size": 32}


def make_trainer(folder: Path, kind: str, task: Any = None, **changes: Any) -> Any:
    model, tokenizer = tiny()
    task = task or Gapped()
    if kind == "grpo":
        config = make_config(folder, max_completion_length=LENGTH, eval_steps=2, eval_problems=4, **changes)
        return Trainer(config, model=model, tokenizer=tokenizer, task=task)
    trainer, config = KINDS[kind]
    settings = config.from_dict({**SUPERVISED, **CHANGED, "output_dir": str(folder), **changes})
    return trainer(settings, model=model, tokenizer=tokenizer, task=task)


def make_policy(**config: Any) -> Policy:
    torch.manual_seed(1)
    policy = Policy(PolicyConfig(hidden_size=16, ffn_size=16, output_bias=0.0, **config))
    with torch.no_grad():
        policy.output_proj.weight.normal_(std=1.0)
    return policy


def by_hand(sampler: Sampler, problem: Problem, row: int, config: SamplerConfig) -> Any:
    """The problem through ``Sampler.infill``; equal rows before it put it in its place, which keys its draws."""
    assert problem.ids is not None
    wanted = {n: getattr(config, n) for n in ("seed", "record", "block_length", "temperature", "actions")}
    return sampler.infill(torch.tensor([list(problem.ids)] * (row + 1)), **wanted)


@pytest.mark.parametrize("block_length", [5, None])
@pytest.mark.parametrize("policy", ["threshold:0.6", "learned"])
def test_problems_are_decoded_as_by_infill(policy: str, block_length: int | None) -> None:
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, make_policy() if policy == "learned" else policy)
    problems = Gapped().problems(8, seed=3)
    assert len({len(p.ids or ()) for p in problems}) > 2
    config = SamplerConfig(
        max_new_tokens=LENGTH, block_length=block_length, temperature=1.0, seed=4, record=True, actions="bernoulli"
    )
    told: list[int] = []
    result = decode_problems(sampler, problems, config, on_finished=told.append)
    assert told[-1] == 8
    assert told == sorted(told)
    assert result.trajectory is not None
    for row, problem in enumerate(problems):
        alone, size = by_hand(sampler, problem, row, config), len(problem.ids or ())
        assert torch.equal(result.sequences[row, -size:], alone.sequences[row])
        assert result.steps[row] == alone.steps[row] > 1
        count = int(result.steps[row])
        for name in ("mask", "allowed", "confidence", "rank"):
            mine, its = (getattr(t, name)[row, :count] for t in (result.trajectory, alone.trajectory))
            assert torch.allclose(mine[:, -size:].float(), its.float(), atol=1e-6), name
        assert int(result.trajectory.missing[row]) == result.sequences.shape[1] - size  # type: ignore[index]


def test_evaluate_grades_the_filled_ids(tmp_path: Path) -> None:
    model, _ = tiny()
    task, count = Gapped(), 12
    config = SamplerConfig(max_new_tokens=LENGTH, block_length=None)
    sampler = Sampler(model, None, "threshold:0.9", config)  # no tokenizer is needed
    row = evaluate(sampler, task, count, completions=tmp_path / "c.jsonl")
    problems = task.problems(count, 0)
    alone = [by_hand(sampler, p, 0, config) for p in problems]
    grades = [task.grade(p, r.sequences[0].tolist()) for p, r in zip(problems, alone, strict=True)]
    steps = [float(r.steps) for r in alone]
    assert row.accuracy == pytest.approx(sum(grades) / count)
    assert 0.3 < row.accuracy < 1
    assert row.nfe == pytest.approx(sum(steps) / count)
    holes = [list(p.ids or ()).count(MASK) for p in problems]
    assert row.tpf == pytest.approx(sum(h / s for h, s in zip(holes, steps, strict=True)) / count)
    assert [line["completion"] for line in lines(tmp_path / "c.jsonl", "")] == [r.sequences[0].tolist() for r in alone]


def test_rewards_count_holes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "grpo", alpha=2.0)
    problems = trainer.problems.take(0, 2)
    rollouts = trainer.collector.collect([p.given for p in problems], torch.full((2,), 2.0), seed=1)
    worth, rewards = trainer.rewards(problems, rollouts, trainer.collector)
    each = [p for p in problems for _ in range(4)]
    for i, p in enumerate(each):
        ids, holes = p.ids or (), list(p.ids or ()).count(MASK)
        grade = trainer.task.grade(p, rollouts.completions[i, -len(ids) :].tolist())
        assert worth[i] == pytest.approx(grade)
        assert rewards[i] == pytest.approx(grade * ((holes - min(int(rollouts.steps[i]), holes) + 1) / holes) ** 2)
    some = torch.tensor([1.0, 1.0])
    assert multiplicative(some, torch.tensor([4, 9]), torch.tensor([4, 8]), 1.0).tolist() == [0.25, 0.125]
    with pytest.raises(ValueError, match="length must be a positive integer"):
        multiplicative(some, some, torch.tensor([4, 0]), 1.0)


@pytest.mark.parametrize("time", ["steps", "share"])
def test_replayed_steps_are_those_that_were_taken(time: str, tmp_path: Path) -> None:
    """Texts of other lengths change neither a step's inputs nor the likelihood of its action."""
    model, tokenizer = tiny()
    trainer = make_trainer(tmp_path, "grpo", replay_chunk_size=5)
    policy = make_policy(time=time, max_period=50.0)
    learner, config = trainer.learner, make_config(tmp_path, max_completion_length=LENGTH)
    learner.policy, given = policy, [p.given for p in Gapped().problems(3, seed=3)]
    collector = Collector(model, tokenizer, policy, config)
    together = collector.collect(given, torch.ones(3), seed=2)
    samples = together.samples
    assert samples.missing is not None
    chunks = list(learner._chunks(samples))
    assert sorted(torch.cat(chunks).tolist()) == list(range(len(samples.rollout)))
    total = torch.zeros(12)
    for index in chunks:
        assert len(samples.missing[index].unique()) == 1
        assert len(index) <= 5
        part = samples.take(index).cut()
        total.index_add_(0, part.rollout, learner._log_prob(part, together)[0].detach())
    for group, ids in enumerate(given):
        alone = collector.collect([ids], torch.ones(1), seed=2, first_group=group)
        logp, _ = learner._log_prob(alone.samples, alone)
        expected = torch.zeros(4).index_add(0, alone.samples.rollout, logp.detach())
        assert torch.allclose(total[4 * group : 4 * group + 4], expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", ["agreement", "survival"])
def test_labels_of_texts_of_several_lengths(kind: str, labels: str, tmp_path: Path) -> None:
    """Each state, cut to its length, holds the model's proposals there, and agreement is with a careful infill."""
    model, tokenizer = tiny()
    trainer = make_trainer(tmp_path, kind, labels=labels)
    problems = Gapped().problems(6, seed=5)
    tried, numbers = trainer.collectors[0].collect([p.given for p in problems], 1)
    careful = Sampler(model, tokenizer, "threshold:0.9")
    finals: dict[int, list[Any]] = {}
    for p in problems:
        final = by_hand(careful, p, 0, SamplerConfig(block_length=None)).sequences[0]
        finals.setdefault(len(final), []).append(final)
    sizes = tried.picked.shape[1] - tried.missing
    assert numbers["states"] == len(tried.picked)
    assert set(sizes.tolist()) <= set(finals)
    assert len(sizes.unique()) > 2
    parts = tried.alike(torch.arange(len(tried.picked)))
    assert sum(len(part.picked) for part in parts) == len(tried.picked)
    for part in parts:
        assert not (part.valid & ~part.inputs.mask).any()
        if kind == "set":
            canvas = part.inputs.tokens.masked_fill(part.inputs.mask, MASK)
            logits = model(canvas).index_fill(-1, torch.tensor([MASK]), -torch.inf)
            p, token = logits.float().softmax(-1).max(-1)
            seen = part.inputs.mask
            assert torch.equal(part.inputs.tokens[seen], token[seen])
            assert torch.allclose(part.inputs.probability[seen], p[seen], atol=1e-3)
        if kind == "set" and labels == "agreement":
            agree = torch.stack([part.inputs.tokens == final for final in finals[part.picked.shape[1]]])
            assert ((agree == part.survived) | ~part.valid).all(-1).any(0).all(), "with the final text of its problem"


@pytest.mark.parametrize("kind", ["grpo", *KINDS])
def test_a_killed_run_goes_on_bit_for_bit(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 3)
    settings: dict[str, Any] = {"calibration_prompts": 3, "iterations": 4}
    whole = make_trainer(tmp_path / "whole", kind, **settings)
    whole.train(progress=False)

    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", kind, **settings).train(kill_after_3, progress=False)
    make_trainer(tmp_path / "parts", kind, **settings, resume_from_checkpoint=True).train(progress=False)
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    rows = [[(r["step"], r.get("loss")) for r in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    policy: Any = load_policy(tmp_path / "parts" / "policy")
    curve = policy.config.calibration[0]
    assert curve.max_new_tokens == LENGTH
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, policy)
    given = [p.given for p in Gapped().problems(20, 0)]
    asked = {**policy.decoding, "max_new_tokens": LENGTH, "target_nfe": curve.falling[0], "seed": 0}
    slow = complete(sampler, given, sampler.settled({**asked, "block_length": None})).steps.float().mean()
    assert float(slow) >= curve.falling[-1] - 1


@pytest.mark.parametrize("kind", ["set", "distill"])
def test_it_learns(kind: str, tmp_path: Path) -> None:
    changes = {"num_prompts": 12, "minibatch_size": 24, "num_iterations": 4, "kept_iterations": 12, "iterations": 20}
    trainer = make_trainer(tmp_path, kind, policy={}, **changes)
    values = [trainer.step() for _ in range(6)]
    assert values[-1]["loss"] < 0.97 * values[-1]["model_loss"]


class Wrong(Gapped):
    """Holes with one change."""

    def __init__(self, ids: Any) -> None:
        super().__init__()
        object.__setattr__(self, "given_ids", ids)

    def sample(self, rng: Any) -> Problem:
        return replace(super().sample(rng), ids=self.given_ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["evaluate", "grpo", *KINDS])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([3, 4, 5], ValueError, f"problem 0 has no hole: none of its 3 ids is the model's mask token, {MASK}"),
        ([], ValueError, "problem 0 has no hole: none of its 0 ids"),
        ([3, MASK, 999], ValueError, r"the problems' ids\[0, 2\] is 999, outside the vocabulary of"),
        ([3, MASK, -1], ValueError, r"the problems' ids\[0, 2\] is -1, outside"),
        ([MASK] * 50, ValueError, "problem 0 has 50 ids, which is more than max_new_tokens=40 "),
        ([MASK, None], TypeError, r"prompts\[0\] must be a string, messages or a list of token ids"),
    ],
)
def test_bad_problems(kind: str, ids: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    model, tokenizer = tiny()
    sampler = Sampler(model, tokenizer, config=SamplerConfig(max_new_tokens=40))
    with pytest.raises(error, match=message):
        evaluate(sampler, Wrong(ids), 2) if kind == "evaluate" else make_trainer(tmp_path, kind, Wrong(ids))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_prompts_and_holes_do_not_mix() -> None:
    model, tokenizer = tiny()
    both = mixture([Hops(), Gapped()])
    with pytest.raises(ValueError, match="problem 0 has a prompt, others have ids with holes"):
        evaluate(Sampler(model, tokenizer, config=SamplerConfig(max_new_tokens=40)), both, 4)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(calibrate, "POINTS", 3)
    task = "infill_task:Gapped"
    assert make_task(task, share=0.5).problems(1, 0)[0].ids
    make_policy().save_pretrained(tmp_path / "policy")
    common = ["--model", "tiny", "--task", task, "--max-new-tokens", str(LENGTH)]
    policy = str(tmp_path / "policy")
    assert main(["calibrate", policy, *common, "--block-length", "full", "--count", "4", "--actions", "greedy"]) == 0
    assert len(load_policy(tmp_path / "policy").config.calibration[0].nfe) == 3  # type: ignore[attr-defined]
    arguments = ["--policies", policy, "threshold:0.9", "--regimes", "full", "--problems", "4", "--task-options"]
    assert main(["evaluate", *common, *arguments, "share=0.5"]) == 0
    assert "threshold:0.9" in capsys.readouterr().out
    output = tmp_path / "run"
    for command in (["train", "set", "quickstart"], ["train", "distill", "quickstart"]):
        changes = {**{k: v for k, v in SUPERVISED.items() if k != "policy"}, **CHANGED, "iterations": 1, "task": task}
        pairs = [f"{k}={v}" for k, v in (changes | {"output_dir": output / command[1]}).items()]
        assert main([*command, *pairs, "calibration_prompts=0"]) == 0

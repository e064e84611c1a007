"""Labels by answers: against careful decodes written out, the loss of a set, whole runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from infill_task import MASK, Gapped
from test_infilling import make_trainer as infilling
from test_supervised import LENGTH, finished, make_trainer
from torch import Tensor
from training_helpers import KINDS, SUPERVISED, Killed, assert_same_policy, kill_after_3, lines, tiny

from unmask.policies.set_policy import SetInputs
from unmask.tasks import Hops
from unmask.training.answers import answer_loss, log_harmless, previous
from unmask.training.labels import Tried

ANSWER: dict[str, Any] = {"labels": "answer", "risks": [0.3, 6.0]}


def test_labels_are_those_of_careful_decodes_from_before_and_after(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **ANSWER)
    model, tokenizer = tiny()
    task, mask, eos = trainer.prompts.task, model.mask_token_id, model.eos_token_id
    assert task is not None
    labels, unsolved = [], 0
    for problem in trainer.prompts.problems(0, 6):
        prompt = tokenizer.encode(problem.prompt)

        def graded(buffer: list[int], problem: Any = problem, prompt: list[int] = prompt) -> float:
            final = finished(prompt, buffer, range(LENGTH))
            return task.grade(problem, tokenizer.decode(final[: final.index(eos)] if eos in final else final))

        tried, numbers = trainer.collectors[0].collect([prompt] * 6, 3, [problem] * 6)
        assert numbers["states"] == len(tried.turn)
        unsolved += not graded([mask] * LENGTH)
        assert bool(len(tried.turn)) == bool(graded([mask] * LENGTH))
        before = torch.where(tried.inputs.mask, mask, tried.inputs.tokens)
        after = torch.where(tried.picked, tried.inputs.tokens, before)
        for n in range(len(before)):
            was, now = graded(before[n].tolist()), graded(after[n].tolist())
            assert was > 0
            assert tried.valid[n].equal(tried.picked[n])
            assert tried.survived[n].equal(tried.picked[n] & (now >= was))
            labels.append(now >= was)
    assert 0.1 < sum(labels) / len(labels) < 0.95
    assert len(labels) > 24
    assert unsolved < 6


def test_the_loss_of_a_set_is_that_of_its_picks_in_their_order() -> None:
    """Each pick counts once, given those of earlier runs and no others."""
    draws = torch.Generator().manual_seed(0)
    turn = torch.randint(0, 4, (20, 7), generator=draws)
    turn[3], turn[4] = 0, 1
    inputs = SetInputs(
        turn.clone(), turn >= 0, torch.rand(20, 7, 2, generator=draws), torch.rand(20, 7, generator=draws)
    )
    none = torch.zeros(20, dtype=torch.int64)
    tried = Tried(inputs, turn, turn > 0, turn > 0, none, none)

    def logits(i: SetInputs, picked: Tensor) -> Tensor:
        return i.probability * 3 - picked.sum(dim=1, keepdim=True) * 0.4

    got = log_harmless(logits, tried)
    for n in range(20):
        total = 0.0
        for run in (1, 2, 3):
            earlier = sum(1 for t in turn[n].tolist() if 0 < t < run)
            for i, t in enumerate(turn[n].tolist()):
                if t == run:
                    total -= math.log1p(math.exp(-(float(inputs.probability[n, i]) * 3 - 0.4 * earlier)))
        assert float(got[n]) == pytest.approx(min(total, -1e-5), abs=1e-5)
    harmless = torch.arange(20) % 2 == 0
    p = got.double().exp()
    wanted = -torch.where(harmless, p, 1 - p).log()
    assert torch.allclose(answer_loss(got, harmless).double(), wanted, atol=1e-4)


def test_the_state_before_is_the_last_one_of_the_row() -> None:
    assert previous(torch.tensor([0, 1, 2, 0, 2, 2]), 3).tolist() == [0, 1, 2, 3, 5, 7]


def test_texts_with_holes_of_several_lengths_are_labelled_too(tmp_path: Path) -> None:
    trainer = infilling(tmp_path, "set", **ANSWER)
    problems = Gapped().problems(12, seed=5)
    tried, numbers = trainer.collectors[0].collect([p.given for p in problems], 1, problems)
    assert numbers["states"] == len(tried.turn) > 6
    sizes = tried.turn.shape[1] - tried.missing
    assert len(sizes.unique()) > 1
    assert set(sizes.tolist()) <= {len(p.ids or ()) for p in problems}
    for part in tried.alike(torch.arange(len(sizes))):
        assert not (part.picked & ~part.inputs.mask).any()
        given = [torch.tensor(p.ids) for p in problems if len(p.ids or ()) == part.turn.shape[1]]
        for mask, tokens in zip(part.inputs.mask, part.inputs.tokens, strict=True):
            kept = [bool(((ids == MASK) | (ids == tokens)).all() and not mask[ids != MASK].any()) for ids in given]
            assert any(kept), "each state is one of a problem's text"


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**ANSWER, "calibration_prompts": 0, "careful_iterations": 0}
    make_trainer(tmp_path / "whole", **settings).train()
    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts", **settings).train(kill_after_3)
    make_trainer(tmp_path / "parts", **settings, resume_from_checkpoint=True).train()
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    assert all(0 <= row["survived"] <= 1 and row["loss"] > 0 for row in lines(tmp_path / "whole"))


def test_a_run_on_what_no_decode_solves_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, **ANSWER)
    monkeypatch.setattr(type(trainer.prompts.task), "grade", lambda *_: 0.0)
    with pytest.raises(ValueError, match="nothing to learn: no problem is solved by a careful decode"):
        trainer.train()


def test_a_task_that_cannot_grade_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Any, train: bool = False) -> None:
        raise ImportError(f"no grader here, {train}")

    monkeypatch.setattr(Hops, "check_gradable", missing)
    with pytest.raises(ImportError, match="no grader here, True"):
        make_trainer(tmp_path / "a", **ANSWER)
    make_trainer(tmp_path / "b")


def test_answers_are_for_set_policies_and_tasks(tmp_path: Path) -> None:
    message = "^labels 'answer' are for set policies, and need a task that grades in place of prompts"
    with pytest.raises(ValueError, match=message):
        KINDS["distill"][1].from_dict({**SUPERVISED, "labels": "answer"})
    with pytest.raises(ValueError, match=message):
        KINDS["set"][1].from_dict({**SUPERVISED, "labels": "answer", "prompts": str(tmp_path / "some.txt")})

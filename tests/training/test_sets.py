"""Set policies learn what survives: labels against brute force, exact resumption, prompts of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_helpers import assert_same_policy, lines, tiny

from unmask import Sampler
from unmask.files import locked
from unmask.policies import load_policy
from unmask.training.config_files import find_config, packaged_configs
from unmask.training.metrics import METRICS
from unmask.training.record import told
from unmask.training.set_config import SETS, SetTrainerConfig
from unmask.training.set_trainer import SetTrainer
from unmask.training.sets import SetCollector

LENGTH = 24
PROMPT = "cEaCfBeGgD:a="
SETTINGS: dict[str, Any] = {
    "policy": {"hidden_size": 16, "ffn_size": 32},
    "max_completion_length": LENGTH,
    "block_length": "full",
    "num_prompts": 6,
    "careful": "threshold:0.9,hold-eos",
    "careful_iterations": 1,
    "iterations": 4,
    "kept_iterations": 2,
    "save_steps": 1,
}


def make_trainer(folder: Path, **changes: Any) -> SetTrainer:
    model, tokenizer = tiny()
    config = SetTrainerConfig.from_dict({**SETTINGS, "output_dir": str(folder), **changes})
    return SetTrainer(config, model=model, tokenizer=tokenizer)


@torch.no_grad()
def finished(prompt: list[int], buffer: list[int], block: range) -> list[int]:
    """``buffer`` decoded within ``block`` by threshold 0.9 with hold-eos, written out for one row."""
    model, _ = tiny()
    mask, eos, buffer = model.mask_token_id, model.eos_token_id, list(buffer)
    while True:
        masked = [i for i in block if buffer[i] == mask]
        ended = eos in buffer and mask not in buffer[: buffer.index(eos)]
        if not masked or ended:
            return buffer
        logits = model(torch.tensor([prompt + buffer]))[0, len(prompt) :].float()
        logits[:, mask] = -torch.inf
        p, token = logits.softmax(-1).max(-1)
        held = [i for i in masked if p[i] > 0.9] or [max(masked, key=lambda i: float(p[i]))]
        picked = [i for i in held if token[i] != eos or all(j in held for j in masked if j < i)]
        if not picked:
            free = [i for i in masked if token[i] != eos or i == masked[0]]
            picked = [max(free, key=lambda i: float(p[i]))]
        for i in picked:
            buffer[i] = int(token[i])


@pytest.mark.parametrize("block_length", [LENGTH, 8])
@pytest.mark.parametrize("iteration", [0, 1])
def test_labels_are_those_of_a_decode_from_each_state(block_length: int, iteration: int, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, block_length=block_length)
    model, tokenizer = tiny()
    prompt = tokenizer.encode(PROMPT)
    collector = SetCollector(model, tokenizer, trainer.policy, trainer.config)
    tried, numbers = collector.collect([prompt] * 6, iteration)
    assert ("own_nfe" in numbers) == (iteration == 1)
    assert numbers["states"] == len(tried.picked) > 20
    inputs, eos, mask = tried.inputs, model.eos_token_id, model.mask_token_id
    assert not (tried.picked & tried.valid).any()
    some = range(0, len(tried.picked), max(1, len(tried.picked) // 12))
    for n in some:
        valid, picked = (t[n].nonzero().flatten().tolist() for t in (tried.valid, tried.picked))
        masked = inputs.mask[n] & ~tried.picked[n]
        buffer = torch.where(masked, mask, inputs.tokens[n]).tolist()
        start = valid[0] - valid[0] % block_length
        assert all(start <= i < start + block_length for i in valid + picked)
        final = finished(prompt, buffer, range(start, start + block_length))
        for i in valid:
            token = int(inputs.tokens[n, i])
            assert bool(tried.survived[n, i]) == (token == (eos if final[i] == mask else final[i])), (n, i)
    shares = tried.survived[tried.valid].float().mean()
    assert 0.1 < shares < 0.99


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()

    def kill(iteration: int, values: dict[str, float]) -> None:
        if iteration == 3:  # before its checkpoint
            raise Killed

    with pytest.raises(Killed):
        make_trainer(tmp_path / "parts").train(kill)
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-000002\)"):
        make_trainer(tmp_path / "parts")
    with pytest.raises(ValueError, match="extra 6 there, 5 here"):
        make_trainer(tmp_path / "parts", extra=5, resume_from_checkpoint=True)
    resumed = make_trainer(tmp_path / "parts", resume_from_checkpoint=True)
    with locked(tmp_path / "parts" / METRICS), pytest.raises(BlockingIOError, match="by another process"):
        resumed.train()
    resumed.train()
    assert_same_policy(tmp_path / "whole" / "policy", tmp_path / "parts" / "policy")
    rows = [[(row["step"], row["loss"]) for row in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [step for step, _ in rows[0]] == [1, 2, 3, 4]
    policy = load_policy(tmp_path / "parts" / "policy")
    model, tokenizer = tiny()
    assert Sampler(model, tokenizer, policy).generate(PROMPT, max_new_tokens=LENGTH).steps.item() <= LENGTH
    training, base = told(tmp_path / "parts" / "policy", None, None)
    assert (training["careful"], training["iteration"], base) == ("threshold:0.9,hold-eos", 4, None)


def test_it_learns(tmp_path: Path) -> None:
    """The network soon tells better than the model's own probabilities what survives."""
    changes = {"num_prompts": 12, "minibatch_size": 24, "num_iterations": 4, "kept_iterations": 12, "iterations": 20}
    trainer = make_trainer(tmp_path, policy={}, **changes)
    values = [trainer.step() for _ in range(5)]
    assert values[-1]["loss"] < 0.85 * values[-1]["model_loss"]


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
    ("changes", "message"),
    [
        ({"careful": "mine"}, "careful must be a rule with its numbers, got 'mine'"),
        ({"careful": "threshold:0.9,edit=0.5"}, "careful must not revise tokens"),
        ({"policy": {"vocab_size": 3}}, "policy: vocab_size cannot be chosen"),
        ({"policy": {"sure": 1.5}}, "policy: sure must be less than 1, got 1.5"),
        ({"risks": [0.0, 1.0]}, "risks must be positive"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"init_policy": "a"}, "init_policy='a' has its own shape"),
    ],
)
def test_what_a_run_does_not_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        SetTrainerConfig.from_dict({**SETTINGS, **changes})


@pytest.mark.parametrize("name", packaged_configs(SETS))
def test_packaged_configurations_are_valid(name: str) -> None:
    assert find_config(name, SETS).read_text().startswith("# ")
    assert SetTrainerConfig.from_yaml(name).iterations > 10


def test_learning_rates() -> None:
    config = SetTrainerConfig.from_dict({**SETTINGS, "iterations": 20})
    assert [round(config.pace(i), 4) for i in (0, 1, 2, 10, 19)] == [0.3333, 0.6350, 0.9050, 0.525, 0.0975]


def test_sets_hold_what_is_certain(tmp_path: Path) -> None:
    """Sets of careful decodes: all above 0.97, and at most ``extra`` more, of those allowed."""
    trainer = make_trainer(tmp_path, extra=2)
    o = observed(64)
    sets = trainer.collector.sets(o, torch.Generator().manual_seed(1), learned=False)
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

"""The recipe of the packaged models: objective, optimizer, resumption."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unmask import Sampler, load_model
from unmask.models.loading import load_tokenizer
from unmask.models.tokenizer import CharTokenizer
from unmask.pretraining.config import RECIPES
from unmask.pretraining.loop import Run, build_model, diffusion_loss, encode_batch, make_tokenizer, open_ends, pretrain
from unmask.pretraining.optimizer import Muon, orthogonalize

SMALL = dataclasses.replace(RECIPES["tiny"], hidden_size=32, num_layers=1, num_heads=2, batch_size=8, steps=6, warmup=2)
LITTLE = dataclasses.replace(RECIPES["little"], hidden_size=32, num_layers=1, num_heads=2, batch_size=8, bf16=False)


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokenizer = CharTokenizer(str(SMALL.characters))
    [group], [again], [other] = (encode_batch(SMALL, tokenizer, step) for step in (3, 3, 4))
    assert torch.equal(group.tokens, again.tokens)
    assert not torch.equal(group.tokens, other.tokens)
    assert torch.equal(group.attention, group.tokens != tokenizer.pad_token_id)


def test_groups_are_of_one_buffer_and_alike_prompts(tmp_path: Path) -> None:
    recipe = dataclasses.replace(LITTLE, batch_size=200, group_rows=16)
    tokenizer = make_tokenizer(recipe, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert make_tokenizer(recipe, tmp_path).ids == tokenizer.ids
    groups = encode_batch(recipe, tokenizer, 0)
    assert sum(len(g.tokens) for g in groups) == 200
    assert {g.buffer for g in groups} == set(recipe.buffers)
    assert max(len(g.tokens) for g in groups) == 16
    for group in groups:
        responses = group.tokens[:, -group.buffer :]
        ends = responses.eq(tokenizer.eos_token_id)
        assert torch.equal(ends, ends.long().cummax(1).values.bool()), "nothing follows an end of sequence"
        assert group.attention[:, 0].any(), "no longer than its longest prompt"
    short = dataclasses.replace(recipe, buffers=(16,), buffer_weights=(1.0,))
    with pytest.raises(ValueError, match=r"the response of .* has \d+ tokens, buffers=\(16,\)"):
        encode_batch(short, tokenizer, 0)


def test_loss_is_one_over_t_weighted_cross_entropy(tmp_path: Path) -> None:
    """With a model that knows nothing, E[sum(mask / t)] / L = 1, so the loss is log V on average."""
    recipe = dataclasses.replace(SMALL, batch_size=256, group_rows=256)
    tokenizer = make_tokenizer(recipe, tmp_path)
    model = build_model(recipe, tokenizer)
    nn.init.zeros_(model.lm_head.weight)
    [group] = encode_batch(recipe, tokenizer, 0)
    rng = torch.Generator().manual_seed(0)
    losses = [diffusion_loss(model, recipe, group, rng).item() / (256 * 24) for _ in range(6)]
    expected = torch.tensor(float(tokenizer.vocab_size)).log().item()
    assert sum(losses) / 6 == pytest.approx(expected, rel=0.05)


def test_open_ends_are_masked_from_a_place_in_the_text_on(tmp_path: Path) -> None:
    recipe = dataclasses.replace(LITTLE, open_share=0.5)
    model = build_model(recipe, make_tokenizer(recipe, tmp_path))
    rows, text = 4000, 10
    response = torch.full((rows, 16), 7).index_fill(1, torch.arange(text, 16), int(model.eos_token_id or 0))
    before, weight = torch.rand(rows, 16) < 0.5, torch.full((rows, 16), 2.0)
    after, weights = open_ends(response, model, recipe, before, weight, torch.Generator().manual_seed(0))
    opened = (weights == 1).any(dim=1)
    assert opened.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(after[~opened], before[~opened])
    end = (weights[opened] == 1).long().argmax(dim=1)
    assert set(end.tolist()) == set(range(text + 1))
    place = torch.arange(16)
    assert after[opened][place >= end[:, None]].all()
    shown = (after[opened] != before[opened]) & (place < end[:, None])
    cut = (place + 1).mul(shown).amax(dim=1)  # all before it is shown
    assert not (after[opened] & (place < cut[:, None])).any()
    assert torch.equal(shown, before[opened] & (place < cut[:, None]))
    assert 0.25 < (cut[end == text] > 0).float().mean() < 0.5


def test_orthogonalize_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 32), (2, 32, 8)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_first_step_by_hand() -> None:
    p = nn.Parameter(torch.eye(4) * 2)
    p.grad = torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    # The direction of an orthogonal gradient is itself, times the polynomial's common value; decay is 1 - 0.05.
    moved = torch.eye(4) * 2 * 0.95 - p.detach()
    value = moved[0, 0].item()
    assert 0.06 < value < 0.13
    assert torch.allclose(moved, value * p.grad, atol=1e-6)


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = pretrain(SMALL, tmp_path / "whole", save_every=3, log_every=100)
    part = Run(SMALL, tmp_path / "part")
    part.folder.mkdir()
    for _ in range(3):
        part.train_step()
    part.save_state()
    resumed = pretrain(SMALL, tmp_path / "part", save_every=3, log_every=100)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert not list((tmp_path / "part").glob("*.partial"))


def test_a_run_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    run = Run(SMALL, tmp_path)
    run.train_step()
    run.save_state()
    with pytest.raises(ValueError, match="another recipe: batch_size 8 there, 4 here; seed 0 there, 1 here"):
        Run(dataclasses.replace(SMALL, batch_size=4, seed=1), tmp_path).load_state()
    assert Run(dataclasses.replace(SMALL, steps=7), tmp_path).load_state(), "a run may be made longer"
    save_file(run.state(), tmp_path / "state.safetensors")  # of before recipes were noted
    assert Run(SMALL, tmp_path).load_state()


def test_exported_model_loads_and_generates(tmp_path: Path) -> None:
    pretrain(dataclasses.replace(SMALL, steps=1), tmp_path, log_every=100)
    out = Sampler.from_pretrained(str(tmp_path)).generate(["aBbC:a="], max_new_tokens=8, block_length=8)
    assert out.finished.all()


def test_a_model_of_words_is_exported_with_its_tokenizer(tmp_path: Path) -> None:
    pretrain(dataclasses.replace(LITTLE, steps=2), tmp_path, save_every=1, log_every=1)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    pretrain(dataclasses.replace(LITTLE, steps=3), tmp_path, log_every=1)
    longer = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert longer[:2] == rows
    assert [row["step"] for row in longer] == [1, 2, 3]
    assert rows[0]["loss"] == pytest.approx(math.log(471), rel=0.2)  # as of one that knows nothing
    sampler = Sampler.from_pretrained(str(tmp_path))
    assert sampler.config.max_new_tokens == 64
    out = sampler.generate(["Line: Tom, Ann, Eve. Reverse the line."], max_new_tokens=8)
    assert out.finished.all()


@pytest.mark.parametrize("name", ["tiny-small", "little-small"])
def test_a_recipe_may_start_from_a_packaged_model(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    tokenizer = make_tokenizer(recipe, tmp_path)
    assert tokenizer.ids == load_tokenizer(str(recipe.start)).ids  # or its embeddings would be of other pieces
    model, larger = build_model(recipe, tokenizer).state_dict(), load_model(str(recipe.start)).state_dict()
    assert len(model) < len(larger)  # a layer less
    assert all(value.equal(larger[name]) for name, value in model.items())
    fresh = dataclasses.replace(recipe, start=None)
    assert not build_model(fresh, tokenizer).embed.weight.equal(larger["embed.weight"])

"""Filling holes in given text."""

from __future__ import annotations

import pytest
import torch
from helpers import EOS, MASK, random_model

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig


def make_sampler(policy: str = "threshold:0.5", **config: object) -> Sampler:
    defaults: dict = {"max_new_tokens": 16, "block_length": 4}
    return Sampler(random_model(), policy=policy, config=SamplerConfig(**{**defaults, **config}))


def test_infill_touches_only_masks() -> None:
    sampler = make_sampler("threshold:0.3", block_length=4)
    torch.manual_seed(0)
    ids = torch.randint(0, EOS, (5, 18))
    holes = torch.rand(5, 18) < 0.4
    holes[3] = False
    ids[0, 2] = EOS  # an end of sequence in the text does not stop the row
    holes[0, 2] = False
    given = ids.masked_fill(holes, MASK)
    out = sampler.infill(given)
    assert torch.equal(out.sequences[~holes], ids[~holes])
    assert not (out.sequences == MASK).any()
    assert out.steps[3] == 0
    assert out.filled.tolist() == holes.sum(dim=1).tolist()
    assert torch.equal(given, ids.masked_fill(holes, MASK)), "the caller's tensor is left alone"


@pytest.mark.parametrize("block_length", [32, 16, 5, None])
def test_a_text_may_be_shorter_than_a_block_or_no_multiple_of_it(block_length: int | None) -> None:
    ids = torch.tensor([[5, MASK, 7, MASK, 2, MASK]])
    out = Sampler(random_model()).infill(ids, block_length=block_length)
    assert not (out.sequences == MASK).any()
    assert out.sequences[0, [0, 2, 4]].tolist() == [5, 7, 2]
    if block_length != 5:
        whole = Sampler(random_model()).infill(ids, block_length=6)
        assert torch.equal(out.sequences, whole.sequences)


@pytest.mark.parametrize("policy", ["threshold:0.3", "confidence:12", "learned"])
def test_left_padding_changes_nothing(policy: str) -> None:
    torch.manual_seed(3)
    chosen = Policy(PolicyConfig(hidden_size=16, ffn_size=16)) if policy == "learned" else policy
    sampler = make_sampler(chosen, record=True, seed=7)  # type: ignore[arg-type]
    ids = torch.randint(0, EOS, (4, 12))
    ids[torch.rand(4, 12) < 0.5] = MASK
    ids[:, 11] = MASK
    attention = torch.ones(4, 12, dtype=torch.int64)
    attention[1, :3] = attention[3, :3] = attention[2, :7] = 0
    together = sampler.infill(ids, attention)
    assert together.trajectory is not None
    for row, pad in enumerate((0, 3, 7, 3)):
        # Draws are keyed by the row's number: equal rows before it put it in its place.
        alone = sampler.infill(ids[row : row + 1, pad:].repeat(row + 1, 1))
        assert torch.equal(together.sequences[row, pad:], alone.sequences[row])
        assert together.steps[row] == alone.steps[row]
        assert together.filled[row] == alone.filled[row] == (ids[row, pad:] == MASK).sum()
        steps = int(alone.steps[row])
        assert alone.trajectory is not None
        for name in ("mask", "allowed", "confidence", "rank", "active"):
            value, recorded = getattr(alone.trajectory, name), getattr(together.trajectory, name)[row, :steps]
            torch.testing.assert_close(recorded if name == "active" else recorded[:, pad:], value[row, :steps])
        assert not together.trajectory.mask[row, :, :pad].any()
        assert not together.trajectory.active[row, steps:].any()


def test_a_row_of_padding_alone_takes_no_step() -> None:
    ids, attention = torch.full((2, 4), MASK), torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    out = make_sampler().infill(ids, attention)
    assert out.steps.tolist()[0] == 0
    assert out.filled.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.infill([[1]]), TypeError, "input_ids must be an int64 tensor"),
        (lambda s: s.infill(torch.ones(3, dtype=torch.int64)), TypeError, "input_ids must be int64 of shape"),
        (lambda s: s.infill(torch.ones((1, 3), dtype=torch.int32)), TypeError, "input_ids must be int64 of shape"),
        (
            lambda s: s.infill(torch.ones((2, 0), dtype=torch.int64)),
            ValueError,
            "input_ids must have at least one token",
        ),
        (lambda s: s.infill(torch.full((1, 2), MASK), max_new_tokens=4), ValueError, "max_new_tokens does not apply"),
        (
            lambda s: s.infill(torch.full((1, 2), MASK), block_length=0),
            ValueError,
            "block_length must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_sampler())  # type: ignore[operator]

"""Streamers get the prompt and then the completion from left to right, each token once, as it becomes final."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model
from torch import Tensor

from unmask import Sampler, SamplerConfig
from unmask.sampling.result import first_stop

PROMPT = "cEaCfBeGgD:a="


class Notes:
    """A streamer that writes down what it gets."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert self.ends == 0
        self.values.append(value)

    def end(self) -> None:
        self.ends += 1


class Drafts(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.drafts: list[list[int]] = []

    def put_draft(self, value: Tensor) -> None:
        assert value.shape[0] == 1
        self.drafts.append(value[0].tolist())


def expected_chunks(sampler: Sampler, prompt: Any, **overrides: Any) -> list[list[int]]:
    """What is final after each step, from the events of the same decoding."""
    chunks, sent = [], 0
    for event in sampler.stream(prompt, **overrides):
        row = event.completions[0]
        stop = (
            row.tolist().index(sampler.model.mask_token_id) if (row == sampler.model.mask_token_id).any() else len(row)
        )
        stop = min(stop, int(first_stop(row[None], sampler.stop_ids)) + 1)
        if stop > sent:
            chunks.append(row[sent:stop].tolist())
            sent = stop
    return chunks


@pytest.mark.parametrize("policy", ["threshold:0.9", "confidence:24", "tiny"])
@pytest.mark.parametrize("block_length", [None, 8])
def test_the_prefix_is_put_as_it_grows(policy: str, block_length: int | None) -> None:
    sampler = Sampler.from_pretrained("tiny", policy=policy)
    notes = Notes()
    result = sampler.generate(PROMPT, streamer=notes, block_length=block_length)
    plain = sampler.generate(PROMPT, block_length=block_length)
    assert torch.equal(result.sequences, plain.sequences)
    assert result.texts == plain.texts
    prompt, *chunks = notes.values
    assert prompt.tolist() == [sampler.tokenizer.encode(PROMPT)]
    assert [chunk.tolist() for chunk in chunks] == expected_chunks(sampler, PROMPT, block_length=block_length)
    assert len(chunks) > 1
    whole = torch.cat(chunks).tolist()
    end = int(first_stop(result.completions, sampler.stop_ids))
    assert whole == result.completions[0, : end + 1].tolist()
    assert notes.ends == 1


def test_positions_wait_for_the_masks_before_them() -> None:
    """Right to left: nothing is final until the very last step."""
    logits = torch.full((6, VOCAB), -9.0)
    for i in range(6):
        logits[i, i + 1] = float(i)  # the later, the surer
    sampler = Sampler(ScriptedModel(logits), None, "confidence:6", SamplerConfig(6, None))
    notes = Drafts()
    sampler.generate([[10, 11]], streamer=notes)
    assert [value.tolist() for value in notes.values] == [[[10, 11]], [1, 2, 3, 4, 5, 6]]
    assert notes.drafts == [[MASK] * (6 - n) + list(range(7 - n, 7)) for n in range(1, 6)]


def test_the_stream_ends_with_the_end_of_sequence() -> None:
    logits = torch.full((6, VOCAB), -9.0)
    for i, token in enumerate((3, 4, EOS, 5, EOS, 6)):
        logits[i, token] = 5.0
    sampler = Sampler(ScriptedModel(logits), None, "confidence:6", SamplerConfig(6, None))
    for stop_at_eos in (True, False):
        notes = Notes()
        sampler.generate([[10]], streamer=notes, stop_at_eos=stop_at_eos)
        assert torch.cat(notes.values[1:]).tolist() == [3, 4, EOS]


def test_what_max_steps_leaves_masked_is_put_at_the_end() -> None:
    model = random_model()
    sampler = Sampler(model, None, "confidence:8", SamplerConfig(8, None, max_steps=3, stop_at_eos=False))
    notes = Notes()
    result = sampler.generate(torch.tensor([[1, 2, 3]]), streamer=notes)
    assert (result.completions == MASK).sum() == 5
    assert torch.cat(notes.values[1:]).tolist() == result.completions[0].tolist()


def test_padding_is_not_part_of_the_prompt() -> None:
    sampler = Sampler(random_model(), None, "threshold:0.5", SamplerConfig(8, 4))
    notes = Notes()
    sampler.generate(torch.tensor([[0, 0, 5, 6]]), attention_mask=torch.tensor([[0, 0, 1, 1]]), streamer=notes)
    assert notes.values[0].tolist() == [[5, 6]]


def test_one_prompt_at_a_time_and_an_end_whatever_happens() -> None:
    sampler = Sampler(random_model(), None, "threshold:0.5", SamplerConfig(8, 4))
    notes = Notes()
    with pytest.raises(ValueError, match="streamer takes one prompt at a time, got 2"):
        sampler.generate([[1], [2]], streamer=notes)
    assert (notes.values, notes.ends) == ([], 1)
    poisoned = Sampler(ScriptedModel(torch.full((8, VOCAB), float("nan"))), None, "threshold:0.5", SamplerConfig(8, 4))
    notes = Notes()
    with pytest.raises(FloatingPointError):
        poisoned.generate([[1]], streamer=notes)
    assert notes.ends == 1
    notes = Notes()
    with pytest.raises(ValueError, match="alpha=2"):
        sampler.generate([[1]], streamer=notes, alpha=2.0)
    assert notes.ends == 1


def test_streamers_of_transformers_print_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sampler = Sampler.from_pretrained("tiny")
    text = sampler.generate(PROMPT).texts[0]  # type: ignore[index]
    assert text
    sampler.generate(PROMPT, streamer=transformers.TextStreamer(sampler.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"
    sampler.generate(PROMPT, streamer=transformers.TextStreamer(sampler.tokenizer))
    assert capsys.readouterr().out == PROMPT + text + "\n"
    streamer = transformers.TextIteratorStreamer(sampler.tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=sampler.generate, args=(PROMPT,), kwargs={"streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == text


def test_drafts_of_transformers_show_the_unfinished_rest(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "TextDiffusionStreamer"):
        pytest.skip("this transformers has no TextDiffusionStreamer")
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9")
    text = sampler.generate(PROMPT).texts[0]  # type: ignore[index]
    streamer = transformers.TextDiffusionStreamer(sampler.tokenizer, skip_prompt=True, skip_special_tokens=False)
    sampler.generate(PROMPT, streamer=streamer)
    shown = capsys.readouterr().out
    assert "\033[33m" in shown
    assert "<mask>" in shown
    final = "".join(part.split("\0337", 1)[0] for part in shown.split("\0338\033[J"))  # drafts are taken back
    assert final == text + "<eos>\n"

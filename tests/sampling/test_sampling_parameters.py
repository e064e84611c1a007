"""top_k, top_p, repetition_penalty, cfg_scale, stop and num_return_sequences against float64 simulations."""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EOS, MASK, VOCAB, ScriptedModel, random_model
from recorded_graphs import RecordedCapture

from unmask import Policy, PolicyConfig, Sampler, SamplerConfig, load_model
from unmask.ops.reference.topk_confidence import _gumbel
from unmask.sampling import logits as logits_module
from unmask.sampling import sampler as sampler_module
from unmask.sampling.config import GENERATION_CONFIG
from unmask.sampling.graphs import StepGraphs
from unmask.sampling.stopping import StopStrings, StopWatch

SHARPNESS = 3.0
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [3, 1], [9, 8]]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 0.5, "top_k": 2, "block_length": 16},
    {"temperature": 1.0, "top_p": 0.4},
    {"temperature": 0.5, "top_p": 0.8, "block_length": 16},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.5},
    {"repetition_penalty": 1.8},
    {"temperature": 1.0, "repetition_penalty": 0.6, "block_length": 16},
    {"cfg_scale": 0.7},
    {"temperature": 0.5, "cfg_scale": 1.5, "repetition_penalty": 1.3, "top_k": 4, "top_p": 0.9},
]


class Letters:
    """A tokenizer whose tokens are letters; the last ones are special."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 97 for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        special = {EOS: "<eos>", MASK: "<mask>", EOS - 1: "<turn>"}
        return "".join(special.get(i, chr(97 + i)) for i in ids if not (skip_special_tokens and i in special))


def make_sampler(policy: Any = "threshold:0.5", model: Any = None, **config: Any) -> Sampler:
    settings = {"max_new_tokens": 16, "block_length": 4, "stop_at_eos": False, "seed": 5, **config}
    return Sampler(model or random_model(sharpness=SHARPNESS), Letters(), policy, SamplerConfig(**settings))


def simulated(canvas: list[int], start: int, number: int, config: SamplerConfig) -> tuple[list[int], int]:
    """Row ``number`` of a call, filled by threshold:0.5, and its forwards."""
    model, given, steps = random_model(sharpness=SHARPNESS), [token != MASK for token in canvas], 0
    block, draws, warmth = config.block_length or len(canvas), torch.tensor([config.seed]), config.temperature

    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens]))[0].double()

    while MASK in canvas:
        x = logits(canvas)
        if config.cfg_scale:
            without = logits([MASK if told else token for token, told in zip(canvas, given, strict=True)])
            x = without + (config.cfg_scale + 1) * (x - without)
        best, first = {}, start + (canvas.index(MASK) - start) // block * block
        for i in range(first, min(first + block, len(canvas))):
            if canvas[i] != MASK:
                continue
            row = x[i].tolist()
            for token in set(canvas) - {MASK}:
                row[token] *= config.repetition_penalty if row[token] < 0 else 1 / config.repetition_penalty
            share = torch.tensor(row).double().softmax(0).tolist()
            kept = sorted(set(range(VOCAB)) - {MASK}, key=lambda token: -row[token])[: config.top_k]
            chosen = kept[0]
            if warmth:
                rates, nucleus = torch.tensor([row[t] / warmth for t in kept]).double().softmax(0).tolist(), []
                for n, token in enumerate(kept):
                    if sum(rates[:n]) < (config.top_p or 1):
                        nucleus.append(token)
                noise = _gumbel(VOCAB, draws, torch.tensor([[number, i - start, steps]]), torch.float64)[0].tolist()
                chosen = max(nucleus, key=lambda token: row[token] / warmth + noise[token])
            best[i] = (share[chosen], chosen)
        surest = max(best, key=lambda i: best[i])
        for i, (sure, token) in best.items():
            if sure >= 0.5 or i == surest:
                canvas[i] = token
        steps += 1
    return canvas[start:], steps


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_row_is_decoded_as_written_out_whatever_is_beside_it(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make_sampler(**settings)
    expected = [simulated([*p, *[MASK] * 16], len(p), i, sampler.config) for i, p in enumerate(PROMPTS)]
    plain = make_sampler(**{name: settings[name] for name in ("temperature", "block_length") if name in settings})
    assert [row for row, _ in expected] != plain.generate(PROMPTS).completions.tolist(), "the settings change something"
    for few, overrides in ((1024, {}), (3, {"max_batch_size": 2}), (1, {"deterministic": True})):
        monkeypatch.setattr(logits_module, "FEW", few)  # tokens that top_p tries before it sorts all
        out = sampler.generate(PROMPTS, **overrides)
        assert list(zip(out.completions.tolist(), out.steps.tolist(), strict=True)) == expected
        assert out.forwards is not None
        assert out.forwards.tolist() == [n * (2 if "cfg_scale" in settings else 1) for n in out.steps.tolist()]
    assert sampler.generate(PROMPTS[:1]).completions.tolist() == [expected[0][0]]
    monkeypatch.setattr(logits_module, "FEW", 1024)
    sampler.graphs = StepGraphs(capture := RecordedCapture())
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # what would wait for the device is not captured
        captured = [sampler.generate(PROMPTS, cuda_graphs=True).completions.tolist() for _ in range(3)]
    assert captured == [[row for row, _ in expected]] * 3
    assert capture.replays > 0


@pytest.mark.parametrize("settings", SETTINGS[-4:], ids=str)
def test_holes_are_filled_as_written_out(settings: dict[str, Any]) -> None:
    sampler = make_sampler(**settings)
    rows = [[3, MASK, 7, MASK, MASK, 2, MASK, 9], [0, 0, MASK, 4, MASK, MASK, 1, MASK]]
    expected = [simulated(list(rows[0]), 0, 0, sampler.config), simulated(rows[1][2:], 0, 1, sampler.config)]
    attention = torch.tensor([[1] * 8, [0, 0, *[1] * 6]])
    out = sampler.infill(torch.tensor(rows), attention)
    assert [out.completions[0].tolist(), out.completions[1, 2:].tolist()] == [row for row, _ in expected]
    assert out.steps.tolist() == [steps for _, steps in expected]


def test_neutral_values_change_no_draw_and_filters_no_confidence() -> None:
    sampler = make_sampler("confidence:8", temperature=1.0, record=True)
    plain = sampler.generate(PROMPTS)
    for neutral in ({"top_p": 1.0}, {"top_p": None}, {"top_k": VOCAB}, {"repetition_penalty": 1.0, "cfg_scale": 0.0}):
        assert torch.equal(sampler.generate(PROMPTS, **neutral).sequences, plain.sequences)
    (one, _), *_ = narrow = [sampler.generate(PROMPTS, **s) for s in ({"top_k": 1}, {"top_p": 1e-9})], 0
    assert torch.equal(one.sequences, sampler.generate(PROMPTS, temperature=0.0).sequences)
    assert all(torch.equal(out.sequences, one.sequences) for out in narrow[0])
    greedy = sampler.generate(PROMPTS, temperature=0.0).trajectory
    torch.testing.assert_close(one.trajectory.confidence, greedy.confidence)


def test_equal_logits_are_kept_together_and_undefined_ones_are_an_error() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, :3], logits[:, MASK] = 2.0, 9.0
    sampler = make_sampler(model=ScriptedModel(logits), max_new_tokens=4, temperature=5.0)
    for filters in ({"top_k": 1}, {"top_p": 1e-3}):
        drawn = {t for seed in range(20) for t in sampler.generate([[5]], seed=seed, **filters).completions[0].tolist()}
        assert drawn == {0, 1, 2}
    logits[1, 4] = float("nan")
    with pytest.raises(FloatingPointError, match="logits were undefined"):
        sampler.generate([[5]], top_p=0.5)


@pytest.mark.parametrize("cache", ["exact", "none"])
def test_blocks_and_caches_keep_rows_apart(cache: str) -> None:
    """Behind a shorter prompt's last block lies what is no token of the row; caches draw as without, when exact."""
    model = load_model(Path(__file__).parents[1] / "golden" / "sdar-tiny")
    sampling = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5, "seed": 3}
    prompts = [[*range(5, 12)], [0, 1, 2], [3] * 9, [8, 8]]
    arguments = {"max_new_tokens": 10, "block_length": 4, "stop_at_eos": False, "cache": cache, **sampling}
    sampler = Sampler(model, policy="threshold:0.3")
    whole = sampler.generate(prompts, **arguments)
    for row, prompt in enumerate(prompts):
        config = sampler.settled(arguments)
        state = sampler.prepare([prompt], None, config, torch.tensor([row]))
        alone = sampler.result(state, config, sampler.steps(state, config))
        assert torch.equal(alone.completions[0], whole.completions[row])
    settings = {**SETTINGS[-1], "cfg_scale": 0.0}
    assert torch.equal(
        make_sampler(**settings, cache="dual", cache_refresh=1).generate(PROMPTS).completions,
        make_sampler(**settings).generate(PROMPTS).completions,
    )


def test_a_token_that_may_be_revised_is_no_repetition_of_itself() -> None:
    """The revising probability of a committed token is that without its own occurrence."""
    logits = torch.zeros(3, VOCAB)
    logits[0, 1], logits[1, 2], logits[2, 3] = 3.0, 3.0, 3.0
    sampler = make_sampler("threshold:0.2,edit=0.1,post=4", ScriptedModel(logits), max_new_tokens=3, record=True)
    out = sampler.generate([[2]], repetition_penalty=1.5)
    assert out.completions[0].tolist() == [1, 2, 3]
    first, last = (out.trajectory.confidence[0, step, :, 0].tolist() for step in (0, -1))  # type: ignore[union-attr]
    sure = [float(torch.tensor([value, *[0.0] * (VOCAB - 1)]).softmax(0)[0]) for value in (3.0, 2.0)]
    assert first == pytest.approx([sure[0], sure[1], sure[0]], abs=1e-6)  # 2 is in the prompt
    assert last == pytest.approx(first, abs=1e-6)


def stopped(sampler: Sampler, prompt: list[int], stop: str) -> tuple[str, int, list[int]]:
    """Text, steps and completion with a stop, from the events of a decoding without."""
    ids: list[int] = []
    for event in sampler.stream([prompt]):
        row = event.completions[0].tolist()
        ids = row[: row.index(MASK)] if MASK in row else row
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        for n in range(1, len(ids) + 1):
            if stop in (text := Letters().decode(ids[:n], "<" not in stop)):
                before = text[: text.index(stop)].replace("<turn>", "")
                return before, event.steps[0], [*ids[:n], *[EOS] * (len(row) - n)]
    return Letters().decode(ids), event.steps[0], row


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("policy", ["threshold:0.8", "confidence:8"])
def test_a_row_ends_with_the_step_that_completes_a_stop(
    policy: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the host learns of it a step late, as on CUDA."""
    watch = functools.partial(StopWatch, late=late)
    monkeypatch.setattr(sampler_module, "StopWatch", lambda strings, filler, late: watch(strings, filler))
    sampler = make_sampler(policy, block_length=16, temperature=1.5, stop_at_eos=True)
    ended = 0
    for prompt in PROMPTS:
        whole = sampler.generate([prompt])
        assert whole.texts is not None
        for stop in {whole.texts[0][at : at + 2] for at in (1, 4)} - {""} | {"<turn>", "zz"}:
            found = sampler.generate([prompt], stop=stop)
            text, steps, ids = stopped(sampler, prompt, stop)
            assert (found.texts, found.steps.tolist(), found.completions[0].tolist()) == ([text], [steps], ids)
            assert found.finished.all()
            ended += steps < int(whole.steps[0])
            together = sampler.generate([prompt, *PROMPTS], stop=["zz", stop], max_batch_size=2)
            assert (together.texts[0], int(together.steps[0])) == (text, steps)  # type: ignore[index]
    assert ended > 2


def test_stops_in_streams_streamers_and_behind_ends_of_sequence() -> None:
    logits = torch.full((6, VOCAB), -9.0)
    for i, token in enumerate((3, 4, 5, EOS, 6, 7)):
        logits[i, token] = 9.0 - i  # left to right, two in each step
    sampler = make_sampler("confidence:3", ScriptedModel(logits), max_new_tokens=6, block_length=None, stop="ef")
    out = sampler.generate([[1]])
    assert (out.texts, out.steps.tolist(), out.filled.tolist()) == (["d"], [2], [3])
    assert out.completions.tolist() == [[3, 4, 5, EOS, EOS, EOS]]
    assert sampler.generate([[1]], stop="gh", stop_at_eos=True).steps.tolist() == [2], "nothing counts behind an end"
    assert sampler.generate([[1]], stop="gh").texts == ["def"]
    assert sampler.generate([[1]], stop=(), stop_ids=[4, 5]).texts == ["d"]
    events = list(sampler.stream([[1]]))
    assert [event.finished for event in events] == [[False], [True]]
    put: list[int] = []
    notes = {"put": lambda self, ids: put.extend(ids.flatten().tolist()), "end": lambda self: None}
    sampler.generate([[1]], streamer=type("Notes", (), notes)())
    assert put == [1, 3, 4, 5]
    half = sampler.generate([[1]], max_steps=1, stop="f")
    assert (half.texts, half.finished.tolist()) == ([Letters().decode([3, 4, MASK, MASK, MASK, MASK])], [False])


def test_stops_with_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from unmask.models.loading import load_tokenizer
    from unmask.testing import write_checkpoint

    tokenizer = load_tokenizer(write_checkpoint("llada", tmp_path))
    ids = tokenizer.encode("one two<|eot_id|>\n\nthree<|end_header_id|>four")
    for stops, before in (
        (["<|eot_id|>"], "one two"),
        (["<|eot_id|>\n"], "one two"),
        (["three", "<|eot_id|>"], "one two"),
        (["zz", "<|end_header_id|>", "<|eot_id|>"], "one two"),
        (["<|end_header_id|>", "thr"], "one two\n\n"),
        (["wo"], "one t"),
    ):
        assert StopStrings(tokenizer, stops, ()).cut([ids])[0][1] == before
    assert StopStrings(tokenizer, ["zz"], ()).cut([ids]) == {}


def test_several_completions_of_each_prompt() -> None:
    sampler = make_sampler(temperature=1.0)
    out = sampler.generate(PROMPTS[:2], num_return_sequences=3)
    assert torch.equal(out.sequences, sampler.generate([p for p in PROMPTS[:2] for _ in range(3)]).sequences)
    assert len(set(map(tuple, out.completions.tolist()))) == 6
    ids = torch.tensor([[3, MASK, MASK, 5, MASK, 7]])
    filled = sampler.infill(ids, num_return_sequences=4)
    assert torch.equal(filled.sequences, sampler.infill(ids.repeat(4, 1)).sequences)
    assert {row for event in sampler.stream(PROMPTS[:2], num_return_sequences=2) for row in event.rows} == {0, 1, 2, 3}
    drawing = Policy(PolicyConfig(hidden_size=16, ffn_size=16))
    for policy in ("random:8", drawing):
        assert len(make_sampler(policy, temperature=0.0).generate([[1]], num_return_sequences=2).steps) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"top_p": 0.9},
            r"top_p=0.9 says what is drawn from, but at temperature=0 nothing is drawn: set a temperature",
        ),
        ({"top_k": 5}, "top_k=5 says what is drawn from"),
        ({"top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"top_p": 0}, "top_p must be greater than 0, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0"),
        ({"cfg_scale": -1.0}, "cfg_scale must be at least 0"),
        ({"cfg_scale": 1.0, "cache": "dual"}, r'cfg_scale=1.0 computes a second .* with cache="dual"'),
        ({"stop": ""}, "stop must be a text that is not empty, got ''"),
        ({"stop": [3]}, "stop must be a text, got 3"),
        ({"stop_ids": [99]}, "stop_ids has 99, outside the vocabulary of 23 tokens"),
        ({"stop_ids": [*range(17)]}, "stop_ids must be a list of at most 16"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences=2 would all be the same: at temperature=0, threshold:0.5 d",
        ),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler().generate([[1]], **settings)


def test_what_a_model_or_call_cannot_do_is_refused_by_name() -> None:
    blocks = Sampler(load_model(Path(__file__).parents[1] / "golden" / "sdar-tiny"))
    with pytest.raises(ValueError, match=r"cfg_scale=1.0 .* needs a bidirectional model .* \(block-causal\)"):
        blocks.generate([[1]], cfg_scale=1.0)
    with pytest.raises(ValueError, match=r"stop=\['a'\] is looked for in texts, but there is no tokenizer"):
        blocks.generate([[1]], stop="a")
    with pytest.raises(ValueError, match="stop does not apply to infill"):
        make_sampler().infill(torch.tensor([[1, MASK]]), stop="a")
    assert make_sampler(stop="a").infill(torch.tensor([[1, MASK]])).finished.all()


DREAM = {"temperature": 0.2, "top_p": 0.95, "top_k": None, "steps": 512, "alg": "entropy", "eos_token_id": 7}
QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [5, 7], "num_beams": 1}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (DREAM, {"temperature": 0.2, "top_p": 0.95, "max_steps": 512, "stop_ids": (7,)}),
        (QWEN, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "stop_ids": (5, 7)}),
        ({**QWEN, "do_sample": False}, {"stop_ids": (5, 7)}),
        ({"do_sample": True, "top_k": 0, "repetition_penalty": 1.1}, {"temperature": 1.0, "repetition_penalty": 1.1}),
        ({"top_k": 50, "max_new_tokens": 64, "stop_strings": "Q:"}, {"max_new_tokens": 64, "stop": ("Q:",)}),
    ],
)
def test_a_generation_config_says_how_to_sample(given: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    (tmp_path / GENERATION_CONFIG).write_text(json.dumps(given))
    sources = [given, tmp_path, str(tmp_path), type("GenerationConfig", (), {"to_dict": lambda self: given})()]
    for source in sources:
        assert SamplerConfig.from_generation_config(source) == SamplerConfig(**expected)
    assert SamplerConfig.from_generation_config(given, block_length=8).block_length == 8


def test_no_generation_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} has no {GENERATION_CONFIG}"):
        SamplerConfig.from_generation_config(tmp_path)
    with pytest.raises(TypeError, match="source must be a folder or hub id, a GenerationConfig or a mapping, got int"):
        SamplerConfig.from_generation_config(3)
    with pytest.raises(ValueError, match="top_p must be at most 1, got 2"):
        SamplerConfig.from_generation_config({"do_sample": True, "top_p": 2})


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)), {})
    drawn, cut, dream = map(json.loads, capsys.readouterr().out.replace("'", '"').splitlines())
    assert (len(drawn), cut) == (4, ["aCcEeGgD", "aBbCcDdE"])
    assert "#" in dream[0]
    assert {f"`{name}`" for setting in SETTINGS for name in setting} - {"`block_length`"} <= set(page.split())

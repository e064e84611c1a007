"""model.generate(..., custom_generate=...) of transformers, in both its forms, decodes as the Sampler does."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, SamplerConfig, load_model
from unmask.integrations.transformers import CUSTOM_GENERATE, custom_generate, generate, sampler_settings
from unmask.integrations.transformers.generate import as_sampler, trimmed
from unmask.models.masked_lm import MaskedLM
from unmask.sampling.result import GenerationResult

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
SIZES: dict[str, Any] = {
    **{"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0},
}
IDS = {"mask_token_id": 4, "eos_token_id": 3}
FORMS: dict[str, dict[str, Any]] = {
    "callable": {"custom_generate": custom_generate},
    "folder": {"custom_generate": CUSTOM_GENERATE, "trust_remote_code": True},
}


class GenerativeBert(transformers.BertForMaskedLM, transformers.GenerationMixin):  # type: ignore[misc]
    """Masked language models have no ``generate`` of their own."""


@pytest.fixture
def model() -> Any:
    torch.manual_seed(1)
    found = GenerativeBert(transformers.BertConfig(**SIZES))
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return found.eval()


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a repository's code to a folder of its cache before it runs it: not into the user's."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)


def prompts(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(5, len(WORDS), (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"policy": "threshold:0.2", "block_length": 8}, {}),
        ({"policy": "confidence:16", "block_length": 5}, {}),  # the last block is shorter
        ({"policy": "tiny", "block_length": 8}, {}),
        ({"policy": "threshold:0.9", "block_length": None, "temperature": 0.8}, {"do_sample": True}),
        ({"policy": "threshold:0.5", "temperature": 1.0}, {"do_sample": True, "num_return_sequences": 3}),
        (
            {"policy": "threshold:0.5", "temperature": 1.0, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.3},
            {"do_sample": True},
        ),
        ({"policy": "threshold:0.2", "cfg_scale": 0.5, "stop_ids": (3, 9)}, {"eos_token_id": [3, 9]}),
    ],
)
def test_both_forms_decode_as_the_sampler(model: Any, form: str, settings: dict[str, Any], arguments: Any) -> None:
    ids = prompts()
    ids[0, :2] = 0
    attention = (ids != 0).long()
    settings = settings | {"max_new_tokens": 16, "seed": 5}
    policy, repeats = settings.pop("policy"), arguments.get("num_return_sequences", 1)
    sampler = Sampler(MaskedLM(model, 4, 3, 0), None, policy)
    by_hand = [x.repeat_interleave(repeats, dim=0) for x in (ids, attention)]
    expected = sampler.generate(*by_hand, **settings)
    given = {name: value for name, value in settings.items() if name != "stop_ids"}
    arguments = {**FORMS[form], **IDS, **given, **arguments, "policy": policy, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=attention, **arguments, return_dict_in_generate=True)
    assert torch.equal(found.completions, expected.completions)
    assert torch.equal(found.steps, expected.steps)
    assert torch.equal(found.sequences, trimmed(expected, 6, settings.get("stop_ids", (3,)), 0))
    assert expected.steps.min() > 1
    if repeats > 1:
        assert len(set(map(tuple, expected.completions.tolist()))) == 2 * repeats
    whole = model.generate(ids, attention_mask=attention, **arguments, stop_at_eos=False)
    assert torch.equal(whole, sampler.generate(*by_hand, **settings, stop_at_eos=False).sequences)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"block_length": None, "alpha": 2.0}, {"block_length": None, "alpha": 2.0}),
        ({"max_length": 30}, {"max_new_tokens": 20}),
        ({"max_length": 30, "max_new_tokens": 8}, {"max_new_tokens": 8}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"do_sample": False, "temperature": 1.0}, {"temperature": 0.0}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"num_beams": 1, "min_p": 0, "typical_p": 1.0, "repetition_penalty": 1.0, "min_length": 0}, {}),
        ({"top_p": 1.0, "top_k": 0, "num_return_sequences": 1}, {}),
        (
            {"do_sample": True, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2},
            {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2},
        ),
        ({"stop_strings": ["a"], "eos_token_id": torch.tensor([3, 5])}, {"stop": ["a"], "stop_ids": (3, 5)}),
        ({"do_sample": False, "top_p": 0.9}, "top_p=0.9 has no effect without do_sample=True, got do_sample=False"),
        ({"num_beams": None, "use_cache": True, "pad_token_id": 3, "logits_processor": []}, {}),
        ({"num_beams": 4}, r"num_beams=4 has no meaning"),
        ({"gen_length": 8}, r"gen_length=8 has no meaning.*; use max_new_tokens$"),
        ({"blok_length": 8}, r"blok_length=8 has no meaning.*block_length"),
        ({"temperature": 0.7}, r"temperature=0.7 has no effect without do_sample=True, got do_sample=None"),
        ({"max_length": 10}, r"max_length must be an integer above the 10 tokens of the prompt, .* got 10"),
    ],
)
def test_arguments_are_translated_or_refused_by_name(arguments: dict[str, Any], expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            sampler_settings(arguments, prompt_length=10)
    else:
        assert sampler_settings(arguments, prompt_length=10) == expected
        SamplerConfig().updated(expected)


class Own(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 has no meaning"),
        ({"max_time": 2.0}, "max_time=2.0 has no meaning"),
        ({"policy": "treshold:0.9"}, "unknown policy 'treshold:0.9'"),
        ({"token_type_ids": torch.ones(2, 6, dtype=torch.int64)}, "token_type_ids must be all 0"),
        ({"position_ids": torch.arange(1, 7)[None]}, "position_ids must count the real tokens"),
        ({"assistant_model": torch.nn.Identity()}, r"assistant_model=Identity\(\) has no meaning"),
        ({"negative_prompt_ids": torch.ones(2, 6)}, "negative_prompt_ids=tensor.* has no meaning"),
        ({"logits_processor": [Own()]}, "logits_processor.* has no meaning"),
        ({"stopping_criteria": [transformers.MaxTimeCriteria(1.0)]}, "stopping_criteria.* has no meaning"),
    ],
)
def test_bad_arguments_of_generate_are_named(model: Any, form: str, arguments: dict[str, Any], message: str) -> None:
    lists = {
        "logits_processor": transformers.LogitsProcessorList,
        "stopping_criteria": transformers.StoppingCriteriaList,
    }
    arguments = {name: lists.get(name, lambda v: v)(value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(), **FORMS[form], **{"max_new_tokens": 8, **IDS, **arguments})


def test_where_ids_and_settings_come_from(model: Any) -> None:
    with pytest.raises(ValueError, match=r"mask_token_id is needed: .* give mask_token_id=tokenizer.mask_token_id"):
        generate(model, prompts(), max_new_tokens=8)
    for name, wrong in (("pad_token_id", "one id, got [3, 5]"), ("eos_token_id", "an integer or a list of integers")):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be {wrong}")):
            generate(model, prompts(), max_new_tokens=8, mask_token_id=4, **{name: [3, 5] if "pad" in name else "x"})
    arguments = {"policy": "threshold:0.5", "stop_at_eos": False}
    expected = generate(model, prompts(), max_new_tokens=8, **arguments, **IDS)
    model.config.sep_token_id = 3  # the end of sequence is that of the config, or its separator
    tokenizer = type("Tokenizer", (), {"mask_token_id": 4})
    assert torch.equal(generate(model, prompts(), max_new_tokens=8, tokenizer=tokenizer, **arguments), expected)
    assert as_sampler(model, None, 4, ()).stop_ids == (3,)
    assert as_sampler(model, None, 4, (5, 3)).stop_ids == (5, 3)
    model.config.eos_token_id = [6, 3]
    assert as_sampler(model, None, 4, ()).stop_ids == (6, 3)
    config = transformers.GenerationConfig(max_length=14, eos_token_id=3)
    for form in FORMS.values():
        found = model.generate(prompts(), generation_config=config, mask_token_id=4, **arguments, **form)
        assert torch.equal(found, expected)


def test_streamers_reach_the_loop(model: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    arguments: dict[str, Any] = {"max_new_tokens": 8, "block_length": 4, "policy": "threshold:0.5", **IDS}
    expected = generate(model, prompts(rows=1), **arguments)
    text = tokenizer.decode(expected[0, 6:], skip_special_tokens=True)
    assert text.strip()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    bound = {"custom_generate": functools.partial(custom_generate, streamer=streamer)}
    for form in (bound, {**FORMS["folder"], "streamer": streamer}):
        assert torch.equal(model.generate(prompts(rows=1), **form, **arguments), expected)
        assert capsys.readouterr().out == text + "\n"
    stop = tokenizer.decode(expected[0, 8:9])
    reading = {"custom_generate": functools.partial(custom_generate, tokenizer=tokenizer), "stop": [stop]}
    texts = {**FORMS["folder"], "tokenizer": tokenizer, "stop_strings": stop}
    for form in (reading, texts):
        assert torch.equal(model.generate(prompts(rows=1), **form, **arguments), expected[:, :7])
    with pytest.raises(ValueError, match="streamer= does not reach custom_generate: functools.partial"):
        model.generate(prompts(rows=1), **FORMS["callable"], streamer=streamer, **arguments)


def test_models_of_this_project_and_samplers() -> None:
    model, sampler = load_model("tiny"), Sampler.from_pretrained("tiny", policy="threshold:0.9")
    ids = torch.tensor([sampler.tokenizer.encode("cEaCfBeGgD:a=")])  # type: ignore[union-attr]
    expected = trimmed(sampler.generate(ids), ids.shape[1], (model.eos_token_id,), None)
    assert expected[0, -1] == model.eos_token_id
    for given in (model, sampler):
        assert torch.equal(generate(given, input_ids=ids, policy="threshold:0.9"), expected)
    with pytest.raises(ValueError, match=r"mask_token_id=5 is not the model's, which is 2; load_model"):
        generate(model, ids, mask_token_id=5)
    assert torch.equal(generate(model, ids, eos_token_id=[1], policy="threshold:0.9"), expected)
    other = int(expected[0, ids.shape[1] + 3])
    behind = expected[0, ids.shape[1] :].tolist().index(other) + ids.shape[1] + 1
    found = generate(sampler, ids, eos_token_id=[1, other])
    assert torch.equal(found, expected[:, :behind])
    text = {"stop_strings": [sampler.tokenizer.decode([other])], "policy": "threshold:0.9"}  # type: ignore[union-attr]
    assert torch.equal(generate(sampler, ids, **text), found)
    assert torch.equal(generate(model, ids, tokenizer=sampler.tokenizer, **text), found)
    with pytest.raises(ValueError, match="stop=\\['#'\\] is looked for in texts, but there is no tokenizer"):
        generate(model, ids, stop_strings="#")
    with pytest.raises(TypeError, match="inputs must be an int64 tensor"):
        generate(model, "cEaC:a=")  # type: ignore[arg-type]


def test_models_of_blocks() -> None:
    """Native ones decode, also with their left padding; the code of their authors is refused."""
    model, ids = load_model(Path(__file__).parents[1] / "golden" / "sdar-tiny"), torch.arange(5, 17).view(2, 6)
    attention = torch.tensor([[0] * 2 + [1] * 4, [1] * 6])
    arguments = {"max_new_tokens": 10, "policy": "threshold:0.1", "stop_at_eos": False}
    found = generate(model, ids, attention_mask=attention, eos_token_id=model.eos_token_id, **arguments)
    expected = [
        Sampler(model, policy="threshold:0.1")
        .generate([row[-n:].tolist()], **{k: v for k, v in arguments.items() if k != "policy"})
        .completions[0]
        for row, n in zip(ids, (4, 6), strict=True)
    ]
    assert torch.equal(found[:, 6:], torch.stack(expected))
    theirs = type("Theirs", (), {"config": transformers.PretrainedConfig(model_type="sdar", name_or_path="JetLM/SDAR")})
    theirs.config.model_type = "sdar"
    with pytest.raises(ValueError, match=r"model_type 'sdar' would be decoded wrongly, .* load_model\('JetLM/SDAR'\)"):
        generate(theirs(), ids, mask_token_id=4)


def test_trimming_by_hand() -> None:
    completions = torch.tensor([[7, 3, 3, 3, 3], [8, 9, 7, 3, 3], [3, 3, 3, 3, 3]])
    rows = torch.ones(3, dtype=torch.int64)
    result = GenerationResult(completions, completions[:, 1:], rows, rows.bool(), rows)  # the first is the prompt
    assert trimmed(result, 1, (3,), 0).tolist() == [[7, 3, 0, 0], [8, 9, 7, 3], [3, 3, 0, 0]]
    assert trimmed(result, 1, (7, 3), None).tolist() == [[7, 3, 7], [8, 9, 7], [3, 3, 7]]
    assert trimmed(result, 1, (), 0).tolist() == completions.tolist()

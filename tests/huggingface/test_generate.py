"""model.generate(..., custom_generate=...) of transformers, in both its forms, decodes as the Sampler does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, SamplerConfig, load_model
from unmask.huggingface import CUSTOM_GENERATE, custom_generate, generate
from unmask.huggingface.generate import trimmed
from unmask.models.masked_lm import MaskedLM
from unmask.sampling.result import GenerationResult

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IDS = {"mask_token_id": 4, "eos_token_id": 3}


class GenerativeBert(transformers.BertForMaskedLM, transformers.GenerationMixin):  # type: ignore[misc]
    """Masked language models have no ``generate`` of their own."""


class GenerativeModernBert(transformers.ModernBertForMaskedLM, transformers.GenerationMixin):  # type: ignore[misc]
    pass


@pytest.fixture(params=["bert", "modernbert"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(1)
    if request.param == "bert":
        found = GenerativeBert(transformers.BertConfig(**SIZES))
    else:
        special = {"sep_token_id": 3, "cls_token_id": 2, "eos_token_id": 3, "bos_token_id": 2}
        found = GenerativeModernBert(transformers.ModernBertConfig(**SIZES, **special, local_attention=8))
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


def by_sampler(
    model: Any, ids: torch.Tensor, attention: Any = None, policy: str = "threshold:0.5", **settings: Any
) -> Any:
    """The same by hand: wrapped, decoded, cut after the longest completion."""
    sampler = Sampler(MaskedLM(model, 4, 3, 0), None, policy, SamplerConfig(**settings))
    return sampler.generate(ids, attention)


FORMS: dict[str, dict[str, Any]] = {
    "callable": {"custom_generate": custom_generate},
    "folder": {"custom_generate": CUSTOM_GENERATE, "trust_remote_code": True},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["threshold:0.2", "confidence:16", "tiny"])
def test_both_forms_decode_as_the_sampler(model: Any, form: str, policy: str) -> None:
    result = by_sampler(model, prompts(), policy=policy, max_new_tokens=16, block_length=8, seed=5)
    expected = trimmed(result, 6, 3, 0)
    found = model.generate(
        prompts(), **FORMS[form], policy=policy, max_new_tokens=16, block_length=8, seed=5, pad_token_id=0, **IDS
    )
    assert torch.equal(found, expected)
    assert result.steps.min() > 1
    assert (found[:, :6] == prompts()).all()
    assert not (found == 4).any()


@pytest.mark.parametrize("form", FORMS)
def test_settings_and_sampling_reach_the_sampler(model: Any, form: str) -> None:
    settings = {"max_new_tokens": 12, "block_length": None, "seed": 3, "stop_at_eos": False}
    expected = by_sampler(model, prompts(), policy="threshold:0.9", temperature=0.8, **settings)
    arguments = dict(settings, do_sample=True, temperature=0.8, policy="threshold:0.9")
    found = model.generate(prompts(), **FORMS[form], **arguments, **IDS, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.steps, expected.steps)
    other = model.generate(prompts(), **FORMS[form], **{**arguments, "seed": 4}, **IDS)
    assert not torch.equal(other, expected.sequences)


@pytest.mark.parametrize("form", FORMS)
def test_left_padding(model: Any, form: str) -> None:
    ids = prompts()
    ids[0, :2] = 0
    attention = (ids != 0).long()
    settings = {"max_new_tokens": 8, "block_length": 4, "stop_at_eos": False}
    expected = by_sampler(model, ids, attention, policy="threshold:0.5", **settings).sequences
    found = model.generate(
        ids, attention_mask=attention, **FORMS[form], policy="threshold:0.5", **settings, pad_token_id=0, **IDS
    )
    assert torch.equal(found, expected)
    alone = model.generate(ids[:1, 2:], **FORMS[form], policy="threshold:0.5", **settings, **IDS)
    assert torch.equal(found[0, 2:], alone[0])


@pytest.mark.parametrize("form", FORMS)
def test_several_completions_of_a_prompt(model: Any, form: str) -> None:
    settings = {"max_new_tokens": 8, "block_length": None, "stop_at_eos": False, "policy": "threshold:0.5"}
    ids = prompts()
    expected = by_sampler(model, ids.repeat_interleave(3, dim=0), temperature=1.0, **settings).sequences
    found = model.generate(ids, **FORMS[form], num_return_sequences=3, do_sample=True, **settings, **IDS)
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found.tolist()}) == 6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 3}, "num_beams=3 has no meaning"),
        ({"do_sample": True, "top_k": 7}, "top_k=7 has no meaning"),
        ({"repetition_penalty": 1.5}, "repetition_penalty=1.5 has no meaning"),
        ({"max_time": 2.0}, "max_time=2.0 has no meaning"),
        ({"policy": "treshold:0.9"}, "unknown policy 'treshold:0.9'"),
        ({"eos_token_id": [3, 5]}, r"eos_token_id must be one id, got \[3, 5\]"),
        ({"token_type_ids": torch.ones(2, 6, dtype=torch.int64)}, "token_type_ids must be all 0"),
    ],
)
def test_bad_arguments_are_named(form: str, arguments: dict[str, Any], message: str) -> None:
    model = GenerativeBert(transformers.BertConfig(**SIZES)).eval()
    with pytest.raises(ValueError, match=message):
        model.generate(prompts(), **FORMS[form], **{"max_new_tokens": 8, **IDS, **arguments})


@pytest.mark.parametrize("form", FORMS)
def test_processors_and_criteria_of_the_callers_own_are_refused(form: str) -> None:
    class Own(transformers.LogitsProcessor):  # type: ignore[misc, name-defined]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores

    model = GenerativeBert(transformers.BertConfig(**SIZES)).eval()
    arguments: dict[str, Any] = {"max_new_tokens": 8, **IDS, **FORMS[form]}
    processors = transformers.LogitsProcessorList([Own()])
    with pytest.raises(ValueError, match=r"logits_processor.* has no meaning"):
        model.generate(prompts(), logits_processor=processors, **arguments)
    criteria = transformers.StoppingCriteriaList([transformers.MaxTimeCriteria(1.0)])
    with pytest.raises(ValueError, match=r"stopping_criteria.* has no meaning"):
        model.generate(prompts(), stopping_criteria=criteria, **arguments)


def test_a_folder_runs_only_when_trusted(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(prompts(), custom_generate=CUSTOM_GENERATE, trust_remote_code=False, max_new_tokens=8)


def test_a_mask_token_must_be_known(model: Any) -> None:
    with pytest.raises(ValueError, match=r"mask_token_id is needed: .* give mask_token_id=tokenizer.mask_token_id"):
        generate(model, prompts(), max_new_tokens=8)

    class Tokenizer:
        mask_token_id = 4

    # The end of sequence is that of the config, or its separator.
    model.config.sep_token_id = 3
    found = generate(model, prompts(), max_new_tokens=8, tokenizer=Tokenizer(), policy="threshold:0.5")
    assert torch.equal(found, generate(model, prompts(), max_new_tokens=8, policy="threshold:0.5", **IDS))


def test_streamers_reach_the_loop(model: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer(str(vocabulary))
    ids = prompts(rows=1)
    arguments: dict[str, Any] = {"max_new_tokens": 8, "block_length": 4, "policy": "threshold:0.5", **IDS}
    expected = generate(model, ids, **arguments)
    text = tokenizer.decode(expected[0, 6:], skip_special_tokens=True)
    assert text.strip()
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    bound = functools.partial(custom_generate, streamer=streamer)
    assert torch.equal(model.generate(ids, custom_generate=bound, **arguments), expected)
    assert capsys.readouterr().out == text + "\n"
    found = model.generate(ids, **FORMS["folder"], streamer=streamer, **arguments)
    assert torch.equal(found, expected)
    assert capsys.readouterr().out == text + "\n"


def test_the_generation_config_of_the_call_and_of_the_model(model: Any) -> None:
    expected = generate(model, prompts(), max_new_tokens=8, policy="threshold:0.5", stop_at_eos=False, **IDS)
    assert expected.shape == (2, 14)
    config = transformers.GenerationConfig(max_length=14, eos_token_id=3)
    for arguments in ({"custom_generate": custom_generate}, FORMS["folder"]):
        found = model.generate(
            prompts(), generation_config=config, policy="threshold:0.5", stop_at_eos=False, mask_token_id=4, **arguments
        )
        assert torch.equal(found, expected)


def test_models_of_this_project_and_samplers() -> None:
    model = load_model("tiny")
    sampler = Sampler.from_pretrained("tiny", policy="threshold:0.9")
    ids = torch.tensor([sampler.tokenizer.encode("cEaCfBeGgD:a=")])
    expected = sampler.generate(ids)
    end = int(trimmed(expected, ids.shape[1], model.eos_token_id, None).shape[1])
    for given in (model, sampler):
        found = generate(given, input_ids=ids, policy="threshold:0.9")
        assert torch.equal(found, expected.sequences[:, :end])
        assert found[0, -1] == model.eos_token_id
    with pytest.raises(ValueError, match=r"eos_token_id=5 is not the model's, which is 1; load_model"):
        generate(model, ids, eos_token_id=5)
    with pytest.raises(TypeError, match="inputs must be an int64 tensor"):
        generate(model, "cEaC:a=")


def test_trimming_by_hand() -> None:
    completions = torch.tensor([[7, 3, 3, 3, 3], [8, 9, 7, 3, 3], [3, 3, 3, 3, 3]])
    sequences = torch.cat((torch.tensor([[5, 6]] * 3), completions), dim=1)
    rows = torch.ones(3, dtype=torch.int64)
    result = GenerationResult(sequences, completions, rows, rows.bool(), rows)
    assert trimmed(result, 2, 3, 0).tolist() == [[5, 6, 7, 3, 0, 0], [5, 6, 8, 9, 7, 3], [5, 6, 3, 0, 0, 0]]
    assert trimmed(result, 2, 3, None).tolist() == [[5, 6, 7, 3, 3, 3], [5, 6, 8, 9, 7, 3], [5, 6, 3, 3, 3, 3]]
    assert trimmed(result, 2, None, 0).tolist() == sequences.tolist()
    assert sequences[0].tolist() == [5, 6, 7, 3, 3, 3, 3]

"""What is refused around loading and saving, and what a description must not stumble over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask import Sampler
from unmask.models import Transformer, TransformerConfig, load_model, save_model
from unmask.models.describe import describe_model
from unmask.testing import write_checkpoint

SIZES: dict[str, Any] = {"vocab_size": 12, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8}


def make_bert(folder: Path, **changes: Any) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, **changes,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    return folder


def test_the_mask_is_no_end_of_sequence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask_token_id must not be an end of sequence, got 2, which ends one"):
        TransformerConfig(**SIZES, mask_token_id=2, eos_token_id=1, stop_ids=(2,))
    for changes in ({"mask_token_id": 1}, {"eos_token_id": [2, 1]}):
        with pytest.raises(ValueError, match="mask_token_id must not be an end of sequence"):
            load_model("tiny", **changes)
    with pytest.raises(ValueError, match="mask_token_id=4 must not be an end of sequence"):
        load_model(make_bert(tmp_path), mask_token_id=4, eos_token_id=4)


def test_saving_keeps_what_is_there(tmp_path: Path) -> None:
    model = Transformer(TransformerConfig(**SIZES, mask_token_id=2, eos_token_id=1))
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has a checkpoint in several files, by model.safetensors.index.json"):
        save_model(model, tmp_path)
    with pytest.raises(ValueError, match="weights that are in memory, but some were left on the disk"):
        save_model(model.to("meta"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_overrides_that_do_not_apply_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block_length=8 is for models that see blocks, but model_type 'unmask' sees"):
        load_model("tiny", block_length=8)
    with pytest.raises(ValueError, match="causal_context is for model_type 'nemotron_labs_diffusion'"):
        load_model("tiny", causal_context=False)
    with pytest.raises(ValueError, match="logits_shift is for remote code; model_type 'bert' has its own"):
        load_model(make_bert(tmp_path), mask_token_id=4, logits_shift=1)
    assert load_model("tiny-blocks", block_length=8).block_length == 8


@pytest.mark.parametrize("device", [None, "nowhere", "xpu:99"])
def test_devices_that_are_not_there_are_named_in_one_line(device: Any) -> None:
    with pytest.raises(RuntimeError, match="^device .*") as caught:
        load_model("tiny", device=device)
    assert "\n" not in str(caught.value)


def test_a_description_survives_integers_and_a_broken_tokenizer(tmp_path: Path) -> None:
    folder = make_bert(tmp_path, eos_token_id=7)
    weights = load_file(folder / "model.safetensors")
    whole = describe_model(str(folder))["parameters"]
    save_file({**weights, "bert.embeddings.position_ids": torch.arange(32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    assert describe_model(str(folder))["parameters"] == whole
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 9}))
    with pytest.raises(ValueError, match="model_type 'gpt2' is not supported"):
        describe_model(str(folder))


def test_a_description_counts_weights_of_eight_bits(tmp_path: Path) -> None:
    folder = make_bert(tmp_path)
    halves = {name: value.bfloat16() for name, value in load_file(folder / "model.safetensors").items()}
    count = sum(value.numel() for value in halves.values())
    name, small = max(halves.items(), key=lambda pair: pair[1].numel())
    for dtype, called in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")):
        save_file({**halves, name: small.to(dtype)}, folder / "model.safetensors")
        size = (2 * count - small.numel()) / 1e6
        assert describe_model(str(folder))["parameters"] == f"{count:,} (BF16, {called}, {size:.3g} MB)"


def test_a_folder_has_one_preset_whatever_it_is_called_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "LLaDA2.1-mini"
    write_checkpoint("llada2", folder)
    monkeypatch.chdir(folder)
    assert load_model(".").generation_defaults["policy"] == load_model(folder).generation_defaults["policy"]
    assert Sampler.from_pretrained(".").policy.edits

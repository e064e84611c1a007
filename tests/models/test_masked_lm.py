"""Masked language models of transformers behind the model interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unmask.models import ModelBase, load_model, load_tokenizer
from unmask.models.masked_lm import HEADS, MaskedLM

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip


def make(kind: str) -> Any:
    """A random model whose outputs depend on every part: transformers initialises biases and norms plainly."""
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    elif kind == "roberta":
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}))
    elif kind == "modernbert":
        model = transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(**SIZES, local_attention=8, sep_token_id=3, cls_token_id=2)
        )
    else:
        model = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**SIZES, embedding_size=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(params=["bert", "roberta", "modernbert", "electra"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, ModelBase]:
    """The transformers model, and what load_model makes of its folder."""
    model = make(request.param)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    return model, load_model(tmp_path)


def write_tokenizer(folder: Path) -> None:
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, len(WORDS), (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_are_the_models_own(pair: tuple[Any, ModelBase]) -> None:
    model, wrapped = pair
    x = ids(3, 17)
    expected = model(x).logits
    assert expected.std() > 0.1
    assert torch.allclose(wrapped(x), expected, atol=1e-5)
    assert torch.allclose(wrapped(x, torch.ones_like(x)), expected, atol=1e-5)


def test_attributes(pair: tuple[Any, ModelBase]) -> None:
    model, wrapped = pair
    assert isinstance(wrapped, MaskedLM)
    assert (wrapped.mask_token_id, wrapped.eos_token_id, wrapped.pad_token_id) == (4, 3, 0)
    assert (wrapped.vocab_size, wrapped.dtype, wrapped.device.type) == (len(WORDS), torch.float32, "cpu")
    assert wrapped.max_length == (38 if model.config.model_type == "roberta" else 40)
    assert not wrapped.training
    assert not any(p.requires_grad for p in wrapped.parameters())


def test_every_stop_id_of_a_checkpoint_is_known(tmp_path: Path) -> None:
    """The tokenizer's, the config's and generation_config.json's, of which ids outside the vocabulary never come."""
    model = make("bert")
    model.config.eos_token_id = [6, 3]
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9999]}')
    assert load_model(tmp_path).stop_ids == (3, 6, 5)
    assert load_model(tmp_path, eos_token_id=[7, 2]).stop_ids == (7, 2)
    with pytest.raises(ValueError, match="horizon is for native models"):
        load_model(tmp_path)(ids(1, 4), horizon=ids(1, 4))


def test_padding_changes_nothing_for_real_tokens(pair: tuple[Any, ModelBase]) -> None:
    """Also with the padding id among the real tokens, from which RoBERTa would count its positions."""
    _, wrapped = pair
    x = ids(3, 14)
    x[:, 9] = 1
    x[:, 11] = 0
    keep = torch.arange(14) >= torch.tensor([[0], [5], [10]])
    out = wrapped(x, keep)
    for row, pad in enumerate((0, 5, 10)):
        alone = wrapped(x[row : row + 1, pad:])[0]
        assert (out[row, pad:] - alone).abs().max() < 1e-4
    full = wrapped.max_length
    assert full is not None
    assert wrapped(ids(1, full)).isfinite().all()
    with pytest.raises(ValueError, match=f"more than the model's context of {full}"):
        wrapped(ids(1, full + 1))


def test_positions(pair: tuple[Any, ModelBase]) -> None:
    model, wrapped = pair
    x = ids(2, 9)
    keep = torch.arange(9) >= torch.tensor([[0], [4]])
    flat = torch.tensor([0, 17, 5, 5])
    heads: list[int] = []
    names = HEADS.get(model.config.model_type)
    if names:
        getattr(wrapped.model, names[-1]).register_forward_hook(lambda m, i, o: heads.append(o.shape[:-1].numel()))
    full = wrapped(x, keep)
    assert torch.allclose(wrapped(x, keep, positions=slice(3, 7)), full[:, 3:7], atol=1e-5)
    assert torch.allclose(wrapped(x, keep, positions=flat), full.flatten(0, 1)[flat], atol=1e-5)
    assert heads == ([18, 8, 4] if names else [])
    assert bool(names) == (model.config.model_type != "electra")


def test_bad_inputs_are_named(pair: tuple[Any, ModelBase]) -> None:
    _, wrapped = pair
    with pytest.raises(TypeError, match=r"input_ids must be torch\.int64"):
        wrapped(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        wrapped(ids(1, 3), torch.ones(1, 4, dtype=torch.bool))


def test_token_ids_without_a_tokenizer(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names a mask token"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    given = load_model(tmp_path, mask_token_id=7, eos_token_id=8)
    assert (given.mask_token_id, given.eos_token_id, given.pad_token_id) == (7, 8, 0)
    with pytest.raises(ValueError, match="mask_token_id=31 is outside the vocabulary of 31"):
        load_model(tmp_path, mask_token_id=31)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle files can run code"):
        load_model(tmp_path, mask_token_id=4)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({QUERY: None}, f"lacks tensors that the model needs: {QUERY}"),
        ({"cls.predictions.transform.dense.weight": None}, "lacks tensors"),
        ({QUERY.replace("1", "2"): torch.zeros(16, 16)}, "has no place for: bert.encoder.layer.2"),
        ({QUERY: torch.zeros(16, 8)}, f"shape that the config does not call for: {QUERY}"),
        ({QUERY: torch.ones(16, 16, dtype=torch.int8)}, "must be stored as F64, F32, F16, BF16, got .* .I8"),
        ({QUERY: torch.full((16, 16), torch.nan)}, f"has tensors with NaN or infinities: {QUERY}"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    model = make("bert")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    unused = {"bert.pooler.dense.weight": torch.zeros(2, 2), "bert.embeddings.position_ids": torch.arange(3)}
    weights = {**load_file(path), **unused}
    save_file(weights, path, metadata={"format": "pt"})
    assert load_model(tmp_path, mask_token_id=4)(ids(1, 5)).equal(model(ids(1, 5)).logits)
    save_file({k: v for k, v in (weights | tensors).items() if v is not None}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, mask_token_id=4)


def test_a_tied_heads_own_weights_are_used(tmp_path: Path) -> None:
    make("bert").save_pretrained(tmp_path)
    path, x = tmp_path / "model.safetensors", ids(1, 5)
    tied = load_model(tmp_path, mask_token_id=4)(x)
    head = torch.randn(len(WORDS), 16, generator=torch.Generator().manual_seed(2))
    save_file({**load_file(path), "cls.predictions.decoder.weight": head}, path, metadata={"format": "pt"})
    model = load_model(tmp_path, mask_token_id=4)
    assert model.model.cls.predictions.decoder.weight.equal(head)
    assert (model(x) - tied).abs().max() > 0.5


KINDS: dict[str, Any] = {
    "MPNet": {},
    "Esm": {"mask_token_id": 4, "position_embedding_type": "absolute"},
    "Luke": {"entity_vocab_size": 10},
    "Nystromformer": {},
    "FNet": {},
    "ConvBert": {"embedding_size": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_are_the_models_own_and_padding_is_kept_apart_or_refused(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "pad_token_id": 1, **KINDS[kind]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    wrapped, x = MaskedLM(model, 4, 3, 1), ids(1, 9)
    assert wrapped(x).equal(model(x).logits)
    keep = torch.arange(12)[None] >= 3
    padded = torch.cat((x[:, :3], x), dim=1)
    if kind in ("Nystromformer", "FNet", "ConvBert"):
        with pytest.raises(ValueError, match=f"padding changes what {kind}ForMaskedLM computes"):
            wrapped(padded, keep)
    else:
        assert torch.allclose(wrapped(padded, keep)[:, 3:], wrapped(x), atol=1e-5)


def test_dtype_and_tokenizer(tmp_path: Path) -> None:
    make("bert").to(torch.bfloat16).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    assert load_model(tmp_path, dtype=torch.float32).dtype == torch.float32
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["[MASK]", "c"]) == [4, 7]


def test_models_without_position_ids_refuse_padding() -> None:
    class Plain(torch.nn.Module):
        config = transformers.BertConfig(**SIZES)

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(31, 31)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            return transformers.modeling_outputs.MaskedLMOutput(logits=self.embed(input_ids))

    wrapped = MaskedLM(Plain(), mask_token_id=4, eos_token_id=None)
    assert wrapped(ids(2, 5), positions=slice(2, None)).shape == (2, 3, 31)
    with pytest.raises(ValueError, match="padding changes what Plain computes"):
        wrapped(ids(2, 5), torch.ones(2, 5, dtype=torch.bool))


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MineConfig(PretrainedConfig):
    model_type = "mine"

    def __init__(self, vocab_size=12, **kwargs):
        self.vocab_size = vocab_size
        super().__init__(**kwargs)


class Mine(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return CausalLMOutput(logits=self.embed(input_ids))
"""


def test_remote_code_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "remote", str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(REMOTE)
    config = {
        "model_type": "mine",
        "vocab_size": 12,
        "auto_map": {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    table = torch.randn(12, 12)
    save_file({"embed.weight": table}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="trust_remote_code=True runs the code it brings"):
        load_model(folder, mask_token_id=11)
    x = torch.tensor([[3, 5, 7], [0, 2, 4]])
    model = load_model(folder, trust_remote_code=True, mask_token_id=11)
    assert torch.equal(model(x), table[x])
    shifted = load_model(folder, trust_remote_code=True, mask_token_id=11, logits_shift=1)
    assert torch.equal(shifted(x), table[torch.tensor([[3, 3, 5], [0, 0, 2]])])
    keep = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert torch.equal(shifted(x, keep)[1, 1:], table[torch.tensor([2, 2])])
    assert torch.equal(shifted(x, keep, positions=torch.tensor([5, 1])), table[torch.tensor([2, 3])])

"""Models split over devices, and weights left on the disk, say what the unsplit model says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, load_model
from unmask.cli import main
from unmask.models import placement
from unmask.models.loading import checked_device
from unmask.testing import write_checkpoint

pytest.importorskip("accelerate")

CPU = torch.device("cpu")
SPLIT = {"": "cpu", "layers.0": "disk", "layers.2": "disk", "lm_head": "disk"}
MAPS: dict[str, Any] = {
    "all on the CPU": {"": "cpu"},
    "some on the disk": SPLIT,
    "the embedding on the disk": {"": "cpu", "embed": "disk"},
    "layers on the disk": {"embed": "cpu", "layers": "disk", "layers.1": "cpu", "final_norm": "cpu", "lm_head": "cpu"},
    "auto": "auto",
    "sequential": "sequential",
}


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llada", tmp_path_factory.mktemp("llada"), layers=3)


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("dream", tmp_path_factory.mktemp("dream"), layers=3)


def ids() -> torch.Tensor:
    return torch.randint(5, 300, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_logits_are_those_of_the_whole_model(llada: Path, dream: Path, name: str, dtype: torch.dtype | None) -> None:
    keep = torch.arange(17) >= torch.tensor([[0], [5], [2]])
    for folder in (llada, dream):
        whole, split = load_model(folder, dtype=dtype), load_model(folder, dtype=dtype, device_map=MAPS[name])
        assert split.device == CPU
        assert split.dtype == whole.dtype
        assert torch.equal(split(ids(), keep), whole(ids(), keep))
        flat = torch.tensor([3, 20, 50])
        assert torch.equal(split(ids(), keep, flat), whole(ids(), keep, flat))


def test_what_is_on_the_disk_takes_no_memory(llada: Path) -> None:
    model = load_model(llada, device_map=SPLIT)
    on_disk = {name for name, p in model.named_parameters() if p.is_meta}
    assert on_disk == {n for n, _ in model.named_parameters() if n.startswith(("layers.0.", "layers.2.", "lm_head."))}
    model(ids())
    assert {name for name, p in model.named_parameters() if p.is_meta} == on_disk, "given back after its use"


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_generation_is_that_of_the_whole_model(dream: Path, cache: str) -> None:
    """Also with keys and values kept, since all is computed on one device."""
    settings: dict[str, Any] = {"max_new_tokens": 24, "block_length": 8, "cache": cache}
    prompts = ["What is 3 + 4?", "How many apples are left?"]
    out = [
        Sampler.from_pretrained(str(dream), "threshold:0.1", device_map=where, chat_template=True).generate(
            prompts, **settings
        )
        for where in (None, SPLIT)
    ]
    assert out[0].completions.equal(out[1].completions)
    assert out[0].steps.equal(out[1].steps)
    assert int(out[0].steps.max()) > 3


def test_masked_language_models_are_split_by_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write_checkpoint("modernbert", tmp_path / "m", layers=3)
    whole = load_model(folder)
    parts = ("model.embeddings", *(f"model.layers.{i}" for i in range(3)), "model.final_norm", "head", "decoder")
    for where in ({"": "cpu"}, "auto", {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}):
        split = load_model(folder, device_map=where)
        assert split.device == CPU
        assert torch.allclose(split(ids()), whole(ids()), atol=1e-6)


def test_the_command_line_takes_a_map(llada: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "What is 3?", "--model", str(llada), "--json", "--max-new-tokens", "16"]
    printed = []
    for more in ([], ["--device-map", "auto"], ["--device-map", '{"": "cpu", "layers.1": "disk"}']):
        assert main([*common, "--block-length", "8", *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("everywhere", "device_map must be a mapping or one of auto, balanced, .*, got 'everywhere'"),
        (
            {"": "cpu", "layers.3": "cpu"},
            r"names 'layers\.3', which is no part of the model; .* layers\.0 to layers\.2",
        ),
        ({"": "cpu", "layers.0.q_proj": "disk"}, r"names 'layers\.0\.q_proj', which is no part"),
        ({"model.transformer.wte": "cpu"}, r"names 'model\.transformer\.wte', which is no part"),
        ({"embed": "cpu", "layers": "cpu"}, "says nothing about 'final_norm'"),
    ],
)
def test_bad_maps_are_named(llada: Path, device_map: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(llada, device_map=device_map)


def test_a_map_takes_the_place_of_a_device(llada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give device='meta' or device_map='auto', not both"):
        load_model(llada, device="meta", device_map="auto")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="device_map needs accelerate"):
        load_model(llada, device_map="auto")
    assert torch.equal(load_model(llada, device_map={"": "cpu"})(ids()), load_model(llada)(ids()))


def test_several_devices(llada: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which device each part gets and where it is computed, with made-up devices and accelerate's part noted."""
    with torch.device("meta"):
        model = placement.Transformer(load_model(llada).config)
    monkeypatch.setattr(placement, "indexed", lambda device: device)
    given = {"": "cuda:0", "layers": "cuda:1", "layers.2": "cpu", "lm_head": "disk"}
    placed = placement.place(model, given, torch.bfloat16, torch.device)
    zero, one = torch.device("cuda:0"), torch.device("cuda:1")
    assert placed == {
        "embed": zero, "rotary": zero, "layers.0": one, "layers.1": one, "layers.2": CPU, "final_norm": zero,
        "lm_head": "disk",
    }  # fmt: skip
    asked: list[Any] = []

    class Accelerate:
        @staticmethod
        def dispatch_model(model: Any, devices: Any, **more: Any) -> None:
            asked.append((devices, more))

    monkeypatch.setattr(placement, "imported_accelerate", Accelerate)
    placement.dispatch(model, placed, {"lm_head.weight": torch.ones(1)})
    devices, more = asked[0]
    assert devices["layers.1"] == "cuda:1"
    assert devices["lm_head"] == "disk"
    assert more.pop("state_dict")["lm_head.weight"] == 1
    assert more == {"main_device": "cuda:0", "offload_index": {}}
    assert model.device == zero
    assert not model.supports_cache, "keys and values would lie on several devices"
    one_device = placement.place(model, {"": "cuda:1", "layers.0": "cpu"}, torch.bfloat16, torch.device)
    placement.dispatch(model, one_device, {})
    assert model.device == one
    assert model.supports_cache, "the CPU's layers are computed on the device"


def test_tied_heads_stay_with_their_embedding(tmp_path: Path) -> None:
    from unmask.models import TransformerConfig, save_model

    config = TransformerConfig(40, 16, 2, 2, 32, mask_token_id=39, eos_token_id=1, tie_embeddings=True)
    model = placement.Transformer(config).requires_grad_(False).eval()
    save_model(model, tmp_path)
    x = ids() % 40
    for where in ({"": "cpu", "lm_head": "disk", "layers.1": "disk"}, {"": "disk", "layers": "cpu"}):
        split = load_model(tmp_path, device_map=where)
        assert torch.equal(split(x), model(x))
    assert placement.place(model, {"": "disk"}, torch.float32, checked_device)["rotary"] == CPU

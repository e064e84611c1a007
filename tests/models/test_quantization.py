"""Weights in int8 and int4 through torchao: what is rounded, how far logits move, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unmask import Sampler, load_model
from unmask.models import Transformer
from unmask.testing import write_checkpoint

pytest.importorskip("torchao")

IDS = torch.tensor([[5, 9, 300, 41, 7, 7, 250, 12], [1, 2, 3, 4, 5, 6, 7, 8]])
SCHEMES = ("int8", "int8-dynamic", "int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantised")
    sizes = {"hidden": 128, "mlp": 256, "inner": 64, "head": 32}
    return {kind: write_checkpoint(kind, root / kind, **sizes) for kind in ("sdar", "sdar-moe", "llada")}


def supported(folder: Path, scheme: str) -> Transformer:
    try:
        model = load_model(folder, dtype=torch.bfloat16, quantization=scheme)
    except ValueError as error:
        if "VNNI" in str(error):
            pytest.skip(str(error))
        raise
    assert isinstance(model, Transformer)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["sdar", "sdar-moe", "llada"])
def test_logits_stay_close_and_only_the_layers_change(folders: dict[str, Path], kind: str, scheme: str) -> None:
    exact, model = load_model(folders[kind], dtype=torch.float32), supported(folders[kind], scheme)
    kept = load_model(folders[kind], dtype=torch.bfloat16)
    for name, p in kept.named_parameters():
        if not name.startswith("layers.") or p.ndim == 1 or ".router." in name:
            assert torch.equal(dict(model.named_parameters())[name], p), name
    wanted = exact(IDS)
    error = (model(IDS).float() - wanted).abs().mean() / wanted.std()
    rounding = (kept(IDS).float() - wanted).abs().mean() / wanted.std()
    assert rounding < error < {"int8": 0.1, "int8-dynamic": 0.2, "int4": 0.5}[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_with_the_exact_cache(folders: dict[str, Path], scheme: str) -> None:
    model = supported(folders["sdar"], scheme)
    settings = {"max_new_tokens": 12, "block_length": 4, "stop_at_eos": False}
    result = Sampler(model, policy="threshold:0.5").generate([[5, 9, 300], [41, 7, 7, 250, 12]], **settings)
    assert not (result.completions == model.mask_token_id).any()
    assert torch.equal(result.steps, result.forwards if result.forwards is not None else result.steps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "int3"}, "quantization must be"),
        ({"quantization": "int8", "device_map": "auto"}, "quantization='int8' is for one device"),
        ({"quantization": "int8", "dtype": torch.float64}, "quantization='int8' computes in"),
    ],
)
def test_what_cannot_be_is_named(folders: dict[str, Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(folders["llada"], **arguments)


PEAK = """
import re, sys, torch
from pathlib import Path
from unmask import load_model

def resident(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

load_model(sys.argv[1], dtype=torch.bfloat16, quantization="int8")
before = resident("VmRSS")
load_model(sys.argv[2], dtype=torch.bfloat16, quantization="int8")
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the peak of a process")
def test_loading_peaks_at_the_quantised_size_and_a_shard(tmp_path: Path) -> None:
    """Matrices of 128 million parameters: 256 MB in bfloat16, 128 in int8, in files of 16."""
    sizes = {"hidden": 1024, "mlp": 4096, "inner": 1024, "head": 64, "layers": 8}
    big = write_checkpoint("sdar", tmp_path / "big", torch.bfloat16, shards=16, **sizes)
    small = write_checkpoint("sdar", tmp_path / "small", torch.bfloat16)
    stored = sum(file.stat().st_size for file in big.glob("*.safetensors")) / 2**20
    assert stored > 200
    run = [sys.executable, "-c", PEAK, str(small), str(big)]
    peak = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert stored / 2 < peak < stored / 2 + 90, "one matrix in float32 takes 16 MB, several times"


def test_masked_lms_are_not_quantised(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="quantization='int8' is for native models"):
        load_model(write_checkpoint("modernbert", tmp_path), quantization="int8")

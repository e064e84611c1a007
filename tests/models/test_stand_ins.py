"""Checkpoints in the published formats, as they come from the hub: sharded weights, tokenizers, precision, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python

from unmask import Sampler, load_model
from unmask.models import Transformer, load_tokenizer
from unmask.models.masked_lm import MaskedLM
from unmask.testing import FORMATS, write_checkpoint

transformers = pytest.importorskip("transformers")

KINDS = {
    "llada": "llada", "dream": "Dream", "modernbert": "modernbert", "sdar": "sdar", "sdar-moe": "sdar_moe",
    "llada2": "llada2_moe", "fast-dllm": "Fast_dLLM_Qwen", "nemotron": "nemotron_labs_diffusion",
}  # fmt: skip
IDS = torch.tensor([[5, 9, 300, 41, 7, 7, 250]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stand-ins")
    return {name: write_checkpoint(name, root / name) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_the_folder_is_what_the_hub_would_give(folders: dict[str, Path], name: str) -> None:
    folder = folders[name]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == shards
    assert len(shards) >= 3
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    assert kind == KINDS[name]
    model = load_model(folder)
    assert isinstance(model, MaskedLM if name == "modernbert" else Transformer)
    assert model.dtype == (torch.float32 if name == "modernbert" else torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_tokenizer_and_model_agree(folders: dict[str, Path], name: str) -> None:
    """Special tokens, the chat template, and that text survives a round trip."""
    model, tokenizer = load_model(folders[name]), load_tokenizer(folders[name])
    assert tokenizer.mask_token_id == model.mask_token_id
    assert set(model.stop_ids) & {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
    text = "def f(x):\n    return x ** 2  # \u00e9"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    shown = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if name not in ("llada", "dream", "modernbert"):
        assert 5 < shown.index(messages[0]["content"]) < len(shown) - len(messages[0]["content"]) - 5
        return
    assert (
        shown
        == {
            "llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is 3 + 4?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "dream": "<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n",
            "modernbert": "[CLS][Question]What is 3 + 4?[Answer]",
        }[name]
    )


@pytest.mark.parametrize("name", ["llada", "modernbert"])
def test_transformers_reads_the_tokenizer_the_same(folders: dict[str, Path], name: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folders[name])
    ours = load_tokenizer(folders[name])
    for text in ("What is 3 + 4?", "<|mdm_mask|>[MASK]"):
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.chat_template == ours.chat_template


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_precisions(folders: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model = load_model(folders[name], dtype=dtype)
    # Rounded, the biases of a router would choose other experts.
    assert {p.dtype for n, p in model.named_parameters() if "expert_bias" not in n} == {dtype}
    exact = load_model(folders[name], dtype=torch.float64)(IDS)
    error = (model(IDS).double() - exact).abs().max() / exact.std()
    assert error < {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]


@pytest.mark.parametrize("name", FORMATS)
def test_from_a_question_to_text(folders: dict[str, Path], name: str) -> None:
    sampler = Sampler.from_pretrained(
        str(folders[name]), policy="confidence:8", dtype=torch.float32, chat_template=True
    )
    out = sampler.generate(["What is 3 + 4?", "And 5?"], max_new_tokens=16, block_length=8, stop_at_eos=False)
    assert out.finished.all()
    assert sampler.model.seeded or out.steps.tolist() == [8, 8]
    assert (out.completions != sampler.model.mask_token_id).all()
    alone = sampler.generate(["And 5?"], max_new_tokens=16, block_length=8, stop_at_eos=False)
    assert out.texts is not None
    assert alone.texts == out.texts[1:]


PEAK = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from unmask.models import load_model

def status(key):
    # VmHWM is of this program; getrusage's ru_maxrss begins with the peak of the process that started it.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

small, folder, dtype, how = sys.argv[1:]
load_model(small)  # everything that is allocated once
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
if how == "copy":
    kept = {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}
    kept = {k: v.clone() for k, v in kept.items()}
    model = load_model(folder, dtype=getattr(torch, dtype))
else:
    model = load_model(folder, dtype=getattr(torch, dtype))
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    return write_checkpoint("llada", folder, shards=6, hidden=1024, heads=8, layers=8, mlp=3072)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_the_weights_and_at_most_one_shard(large: Path, folders: dict[str, Path], dtype: str) -> None:
    """In a process of its own, on a sharded checkpoint of more than 200 MB."""
    sizes = [path.stat().st_size for path in large.glob("*.safetensors")]
    assert len(sizes) >= 6
    assert sum(sizes) > 200e6

    def peak(how: str) -> tuple[int, int]:
        done = run_python(PEAK, str(folders["llada"]), str(large), dtype, how)
        assert done.returncode == 0, done.stderr
        measured, held = map(int, done.stdout.split())
        return measured, held

    measured, held = peak("stream")
    assert held == pytest.approx(sum(sizes) * (2 if dtype == "float32" else 1), rel=1e-3)
    assert measured > 0.9 * held, "or the measurement sees nothing"
    assert measured < held + max(sizes), f"peak {measured / 1e6:.0f} MB, weights {held / 1e6:.0f} MB"
    if dtype == "bfloat16":
        assert peak("copy")[0] > held + max(sizes), "the bound would not notice a second copy"


def write_config(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bd3lm"}, r"model_type 'bd3lm' \(BD3-LM\) is not supported: .* silently wrong"),
        ({"model_type": "llada2_moe", "expert_capacity": 8}, r"expert_capacity=8 \(LLaDA2\.2\) is not supported"),
    ],
)
def test_unsupported_models_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str, trusted: bool
) -> None:
    """Also with their own code, which would run, and whose logits would be wrong on a whole canvas."""
    auto = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "configuration.Config"}
    with pytest.raises(ValueError, match=message):
        load_model(write_config(tmp_path / "m", auto_map=auto, **config), trust_remote_code=trusted)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llada", "num_experts": 64, "d_model": 64},
        {"model_type": "Dream", "n_routed_experts": 8},
        {"model_type": "llada_moe", "num_local_experts": 4, "auto_map": {"AutoModel": "m.M"}},
    ],
)
def test_mixtures_of_experts_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    key = next(k for k in config if "experts" in k)
    message = rf"model_type '{config['model_type']}' is a mixture of experts \({key}={config[key]}\), which is native"
    with pytest.raises(ValueError, match=message):
        load_model(write_config(tmp_path / "m", **config))


def test_a_dense_model_that_counts_its_experts_as_none_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    write_checkpoint("llada", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_experts": 0}))
    assert torch.equal(load_model(folder)(IDS), load_model(folders["llada"])(IDS))

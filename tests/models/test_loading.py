"""Checkpoints in and out: what loads, what is refused and why, and how much memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import run_python
from safetensors.torch import load_file, save_file

from unmask.models import CharTokenizer, Transformer, load_model, load_tokenizer, packaged_models, save_model, sources
from unmask.models import weights as weight_files

Build = Callable[..., Transformer]
INDEX = "model.safetensors.index.json"
IDS = torch.arange(10)[None]


def shard(folder: Path, parts: int) -> None:
    """Split a folder's model.safetensors into ``parts`` files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % parts}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a folder's model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.fixture
def folder(build: Build, tmp_path: Path) -> Path:
    save_model(build(), tmp_path / "model", CharTokenizer("abc"))
    return tmp_path / "model"


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True, "logits_shift": 1}])
@pytest.mark.parametrize("parts", [0, 1, 4])
def test_round_trip_is_exact(build: Build, tmp_path: Path, changes: dict, parts: int) -> None:
    model = build(**changes)
    model.generation_defaults = {"max_new_tokens": 32, "block_length": 8}
    save_model(model, tmp_path)
    if parts:
        shard(tmp_path, parts)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Transformer)
    assert loaded.config == model.config
    assert loaded.generation_defaults == model.generation_defaults
    assert torch.equal(loaded(IDS), model(IDS))
    tied = loaded.lm_head.weight.data_ptr() == loaded.embed.weight.data_ptr()
    assert tied == bool(changes.get("tie_embeddings"))
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_pretraining_format(build: Build, tmp_path: Path) -> None:
    """A config of ``TransformerConfig``'s fields and a plain dump of the parameters."""
    model = build()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unmask", **asdict(model.config)}))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert torch.equal(load_model(str(tmp_path))(IDS), model(IDS))


def test_dtypes(build: Build, tmp_path: Path) -> None:
    model = build()
    save_model(model.to(torch.bfloat16), tmp_path)
    assert load_model(tmp_path).dtype == torch.bfloat16
    for dtype in (torch.float32, "float32", torch.float64, torch.float16):
        loaded = load_model(tmp_path, dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {getattr(torch, str(dtype).removeprefix("torch."))}
        assert torch.equal(loaded.embed.weight.float(), model.embed.weight.to(loaded.dtype).float())
        assert loaded.rotary.cos.dtype == torch.float32
    for bad in ("int8", torch.int64, "nonsense", 3):
        with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.bfloat16"):
            load_model(tmp_path, dtype=bad)


@pytest.mark.parametrize(("dtype", "check"), [("bfloat16", "bf16"), (torch.float16, "fp16")])
def test_a_dtype_that_the_cpu_emulates_is_warned_of(
    dtype: torch.dtype | str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"_is_mkldnn_{check}_supported"
    if not hasattr(torch.ops.mkldnn, name):
        pytest.skip("this torch does not tell what oneDNN computes")
    for has_instructions in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda found=has_instructions: found)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_model("tiny", dtype=dtype)
            load_model("tiny", dtype="float32")
            load_model("tiny")
        expected = [] if has_instructions else [f"this CPU has no instructions for {str(dtype).removeprefix('torch.')}"]
        assert [str(one.message).partition(";")[0] for one in said] == expected


def test_tied_checkpoint_with_a_stored_head(build: Build, tmp_path: Path) -> None:
    model = build(tie_embeddings=True)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda w: w.update({"lm_head.weight": w["embed.weight"].clone()}))
    assert torch.equal(load_model(tmp_path)(IDS), model(IDS))
    rewrite(tmp_path, lambda w: w["lm_head.weight"][0, 0].add_(1))
    with pytest.raises(ValueError, match="ties the head to the embedding, but 'lm_head.weight' differs"):
        load_model(tmp_path)


def test_stored_rotary_tables_are_ignored(folder: Path, build: Build) -> None:
    rewrite(folder, lambda w: w.update({f"layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}))
    assert torch.equal(load_model(folder)(IDS), build()(IDS))


def test_weights_are_memory_of_their_own(folder: Path, build: Build) -> None:
    """Overwriting the file must not reach a loaded model."""
    loaded = load_model(folder)
    path = folder / "model.safetensors"
    with path.open("rb+") as file:
        file.seek(-400, os.SEEK_END)
        file.write(b"\0" * 400)
    assert torch.equal(loaded(IDS), build()(IDS))


def write(folder: Path, name: str, text: str | bytes) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    write(folder, "config.json", json.dumps({k: v for k, v in raw.items() if v != "drop"}))


def truncate(folder: Path, size: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    write(folder, "model.safetensors", data[:size])


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write(folder, "pytorch_model.bin", b"\x80\x04.")


def lose_shard(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-1.safetensors").unlink()


def lose_tensor_of_shard(folder: Path) -> None:
    shard(folder, 3)
    save_file({}, folder / "model-1.safetensors")


def repeat_tensor(folder: Path) -> None:
    shard(folder, 2)
    weights = {**load_file(folder / "model-0.safetensors"), **load_file(folder / "model-1.safetensors")}
    save_file(weights, folder / "model-1.safetensors")


def escape(folder: Path) -> None:
    write(folder, INDEX, json.dumps({"weight_map": {"embed.weight": "../model.safetensors"}}))


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
    "config not JSON": (lambda f: write(f, "config.json", "{"), ValueError, r"config\.json is not valid JSON"),
    "config not an object": (lambda f: write(f, "config.json", "[]"), ValueError, "must hold a JSON object, got list"),
    "unknown type": (lambda f: edit_config(f, model_type="llava_llada"), ValueError,
        r"model_type 'llava_llada' is not supported; supported: unmask, llada, Dream, .* and the masked"),
    "no type": (lambda f: edit_config(f, model_type="drop"), ValueError, "model_type None is not supported"),
    "autoregressive": (lambda f: edit_config(f, model_type="qwen2"), ValueError, "'qwen2' is not supported"),
    "own code": (lambda f: edit_config(f, model_type="mine", auto_map={"AutoModel": "mine.Mine"}), ValueError,
        "trust_remote_code=True runs the code it brings"),
    "unknown key": (lambda f: edit_config(f, hidden=3), ValueError, r"fields \['hidden'\]; did you mean hidden_size"),
    "missing key": (lambda f: edit_config(f, num_heads="drop"), ValueError, "config.json: num_heads is missing"),
    "bad value": (lambda f: edit_config(f, num_heads=5, head_dim=0), ValueError,
        "hidden_size must be num_heads=5 times an even"),
    "bad defaults": (lambda f: edit_config(f, generation_defaults=[1]), ValueError, "generation_defaults must be"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError,
        r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    "pickle": (replace_by_pickle, ValueError, r"pytorch_model\.bin only: pickle files can run code"),
    "truncated header": (lambda f: truncate(f, 5), ValueError, r"model\.safetensors is damaged or incomplete"),
    "truncated data": (lambda f: truncate(f, 20_000), ValueError, r"model\.safetensors is damaged or incomplete"),
    "empty file": (lambda f: truncate(f, 0), ValueError, r"model\.safetensors is damaged or incomplete"),
    "missing tensor": (lambda f: rewrite(f, lambda w: w.pop("layers.1.q_proj.weight")), ValueError,
        r"lacks 1 tensors the config calls for: layers\.1\.q_proj\.weight"),
    "missing tensors": (lambda f: edit_config(f, num_layers=5), ValueError,
        r"lacks 18 tensors .*layers\.3\.attn_norm\.weight, .* and 14 more"),
    "endless layers": (lambda f: edit_config(f, num_layers=2**62), ValueError,
        r"calls for 4611686018427387904 layers, the weights are \d+ tensors"),
    "missing head": (lambda f: rewrite(f, lambda w: w.pop("lm_head.weight")), ValueError,
        r"lacks 1 tensors .*: lm_head\.weight"),
    "extra tensors": (lambda f: edit_config(f, num_layers=2), ValueError,
        r"has 9 tensors the config does not call for: layers\.2\.attn_norm\.weight"),
    "wrong shape": (lambda f: edit_config(f, intermediate_size=21), ValueError,
        r"tensor 'layers\.\d\.\w+_proj\.weight' has shape \(.*20.*\), the config calls for \(.*21.*\)"),
    "integer weights": (lambda f: rewrite(f, lambda w: w.update({"embed.weight": w["embed.weight"].to(torch.int8)})),
        ValueError, "tensor 'embed.weight' is stored as I8; supported: F64, F32, F16, BF16"),
    "missing shard": (lose_shard, FileNotFoundError, r"lacks the shard model-1\.safetensors that .*index\.json names"),
    "tensor not in its shard": (lose_tensor_of_shard, ValueError, r"lacks \d+ tensors"),
    "tensor twice": (repeat_tensor, ValueError, "is in both model-0.safetensors and model-1.safetensors"),
    "index out of the folder": (escape, ValueError, r"'\.\./model\.safetensors', which is not a safetensors file of"),
    "empty index": (lambda f: write(f, INDEX, "{}"), ValueError, "has no weight_map"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_explained(folder: Path, case: str) -> None:
    damage, error, message = BROKEN[case]
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) or case == "tensor twice"


def test_nothing_is_read_before_everything_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(folder, 3)
    edit_config(folder, num_layers=5)
    monkeypatch.setattr(weight_files, "read_tensors", lambda *a: pytest.fail("read a tensor of a broken checkpoint"))
    with pytest.raises(ValueError, match="lacks 18 tensors"):
        load_model(folder)


PEAK = """
import sys, torch
from unmask.models import load_model

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

load_model(sys.argv[1])  # everything that is allocated once
for folder, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    model = load_model(folder, dtype=getattr(torch, dtype))
    print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory through /proc")
def test_no_second_copy_in_memory(build: Build, tmp_path: Path, folder: Path) -> None:
    model = build(hidden_size=512, num_heads=8, num_layers=5, intermediate_size=1024, num_kv_heads=8)
    size = sum(p.numel() * 4 for p in model.parameters())
    assert size > 50e6
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    save_model(model, whole)
    shutil.copytree(whole, sharded)
    shard(sharded, 6)
    loads = ((whole, "float32"), (sharded, "float32"), (sharded, "bfloat16"))
    done = run_python(PEAK, str(folder), *(str(part) for load in loads for part in load))
    assert done.returncode == 0, done.stderr
    for (path, dtype), line in zip(loads, done.stdout.splitlines(), strict=True):
        peak, held = map(int, line.split())
        assert held == size // (1 if dtype == "float32" else 2)
        # The model, the largest tensor twice (as stored and as kept, 2 MB each), and some slack of the allocator.
        assert peak < held + 10e6, f"{path.name} {dtype}: peak {peak / 1e6:.0f} MB, model {held / 1e6:.0f} MB"


def test_saving_is_atomic(folder: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that dies leaves the old files whole and no debris."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def die(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weight_files, "save_file", die)
    with pytest.raises(OSError, match="disk full"):
        save_model(build(seed=1), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_only_transformers_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="save_model writes Transformer models, got Linear"):
        save_model(torch.nn.Linear(2, 2), tmp_path)


def test_converted_checkpoints_keep_their_logits(tmp_path: Path) -> None:
    for name in ("llada-tiny", "dream-tiny"):
        source = Path(__file__).parents[1] / "golden" / name
        save_model(load_model(source), tmp_path / name)
        assert torch.equal(load_model(tmp_path / name)(IDS), load_model(source)(IDS))


def test_packaged_models(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, path in packaged_models().items():
        assert load_tokenizer(name).mask_token_id == load_model(name).mask_token_id
        assert (path / "config.json").is_file()
    (tmp_path / "package").mkdir()
    folder.rename(tmp_path / "package" / "tiny_other")
    monkeypatch.setattr(sources, "_PACKAGE", tmp_path / "package")
    assert list(packaged_models()) == ["tiny-other"]
    assert isinstance(load_model("tiny-other"), Transformer)
    assert load_tokenizer("tiny-other").encode("cab") == [5, 3, 4]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-other").mkdir()  # a folder of that name is reached with a path only
    assert isinstance(load_model("tiny-other"), Transformer)
    with pytest.raises(FileNotFoundError, match=r"tiny-other has no config\.json"):
        load_model("./tiny-other")


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere-at-all", Path("nowhere")])
def test_missing_folders_are_not_looked_up_on_the_hub(name: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "download", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*packaged models:"):
        load_model(name)


def test_hub_repositories(folder: Path, monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, Any]] = []

    def snapshot(name: str, **arguments: Any) -> str:
        asked.append((name, arguments))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert torch.equal(load_model("someone/model-1.5", revision="main")(IDS), build()(IDS))
    assert load_tokenizer("someone/model-1.5", revision="v2").decode([3]) == "a"
    (_, model), (_, tokenizer) = asked
    assert [a for a, _ in asked] == ["someone/model-1.5"] * 2
    assert (model["revision"], tokenizer["revision"]) == ("main", "v2")
    assert "*.safetensors" in model["allow_patterns"]
    assert not {"*.py", "*.bin", "*"} & set(model["allow_patterns"])
    assert "*.safetensors" not in tokenizer["allow_patterns"]
    with pytest.raises(ValueError, match="revision='v1' goes with a hub id"):
        load_model(folder, revision="v1")


def test_hub_failures_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(name: str, **_: Any) -> str:
        raise hub.errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConnectionError, match=r"'some/model' is neither a packaged model .*Cannot find .*offline\?"):
        load_model("some/model")
    with pytest.raises(ConnectionError, match=r"nor a local folder \(did you mean little\?\)"):
        load_model("litle")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        load_model("some/model")


def test_without_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m == "transformers" or m.startswith("transformers.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert isinstance(load_model(folder), Transformer)
    (folder / "char_tokenizer.json").rename(folder / "tokenizer.json")
    with pytest.raises(ImportError, match="pip install transformers"):
        load_tokenizer(folder)
    edit_config(folder, model_type="bert")
    with pytest.raises(ImportError, match=r"model_type 'bert' is not native \(unmask, llada, Dream, .*\).*pip install"):
        load_model(folder)


def test_devices(folder: Path) -> None:
    assert load_model(folder, device=torch.device("cpu")).device.type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' was asked for, but this torch sees no CUDA device"):
            load_model(folder, device="cuda")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streaming_to_cuda(folder: Path, build: Build) -> None:
    loaded = load_model(folder, device="cuda")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert torch.allclose(loaded(IDS.cuda()).cpu(), build()(IDS), atol=1e-3)

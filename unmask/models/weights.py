"""Safetensors checkpoints: checked as a whole first, then streamed tensor by tensor into a model on the meta device."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.models import native
from unmask.models.tokenizer import CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids)$")
"""Tables some checkpoints store although they follow from the config."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """The file of a tensor, its name there, and its header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises FileNotFoundError, or ValueError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises FileNotFoundError for missing ones, ValueError for a bad index."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not a safetensors file of that folder")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} lacks the shard {name} that {INDEX} names")
        return [folder / name for name in names]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        raise ValueError(
            f"{folder} has its weights in {', '.join(pickles[:3])} only: pickle files can run code and are not read; "
            "convert them to safetensors"
        )
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete: {error}") from None


def read_headers(files: list[Path]) -> dict[str, Stored]:
    """Every stored tensor by name. Raises ValueError for damaged files and names stored twice."""
    stored: dict[str, Stored] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in stored:
                    raise ValueError(f"tensor {name!r} is in both {stored[name].file.name} and {path.name}")
                piece = file.get_slice(name)
                stored[name] = Stored(path, name, tuple(piece.get_shape()), piece.get_dtype())
    return stored


def some(names: set[str]) -> str:
    """The first names of a set, for an error message."""
    listed = ", ".join(sorted(names)[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"


def check_headers(
    stored: Mapping[str, Stored], names: Mapping[str, str], shapes: Mapping[str, torch.Size], where: Path
) -> None:
    """Raise ValueError naming what in a checkpoint's headers differs from what the model needs."""
    if missing := set(names) - set(stored):
        raise ValueError(f"{where} lacks {len(missing)} tensors the config calls for: {some(missing)}")
    if extra := {name for name in set(stored) - set(names) if not BUFFERS.search(name)}:
        raise ValueError(f"{where} has {len(extra)} tensors the config does not call for: {some(extra)}")
    for theirs, ours in names.items():
        entry = stored[theirs]
        if entry.shape != tuple(shapes[ours]):
            raise ValueError(
                f"{entry.file}: tensor {theirs!r} has shape {entry.shape}, the config calls for {tuple(shapes[ours])}"
            )
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.file}: tensor {theirs!r} is stored as {entry.dtype}; supported: {', '.join(DTYPES)} "
                "(quantised checkpoints are not)"
            )


def read_tensor(entry: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy one tensor. The file is mapped for this tensor alone, so that mapped pages do not accumulate."""
    with opened(entry.file) as file:
        source = file.get_tensor(entry.name)
        return torch.empty(source.shape, dtype=dtype, device=device).copy_(source)


def checked_weights(model: Transformer, folder: Path, names: Mapping[str, str]) -> dict[str, Stored]:
    """Where each parameter of ``model`` is stored, in the order of the files; only headers are read.

    ``names`` maps the checkpoint's names to the model's. Raises ValueError or FileNotFoundError unless the
    checkpoint holds exactly what the model needs.
    """
    stored = read_headers(find_shards(folder))
    names = dict(names)
    if model.config.tie_embeddings:  # a stored copy of the embedding is accepted, but not read
        heads = {theirs for theirs, ours in names.items() if ours == "lm_head.weight"}
        names = {theirs: ours for theirs, ours in names.items() if theirs not in heads}
        stored = {name: entry for name, entry in stored.items() if name not in heads}
    check_headers(stored, names, {name: p.shape for name, p in model.named_parameters()}, folder)
    return {names[theirs]: entry for theirs, entry in stored.items() if theirs in names}


def stream_weights(
    model: Transformer,
    weights: Mapping[str, Stored],
    dtype: torch.dtype,
    place: Callable[[str], torch.device | None],
    rotary_device: torch.device,
) -> None:
    """Fill ``model``, built on the meta device, one tensor at a time.

    ``place`` gives the device of a parameter, or None to leave it on the meta device.
    """
    for name, entry in weights.items():  # in the order of the files, so that each is read from front to back
        device = place(name)
        if device is None:
            continue
        owner, _, leaf = name.rpartition(".")
        tensor = read_tensor(entry, dtype, device)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.rotary.to_empty(device=rotary_device)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, flush to the disk, then rename, so that a crash leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_model(model: Transformer, folder: str | Path, tokenizer: CharTokenizer | WordTokenizer | None = None) -> None:
    """Write a :class:`Transformer`, wherever it came from, in this project's format; ``load_model(folder)`` reads it.

    Every file is replaced atomically. Raises TypeError for models that are no Transformer.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"save_model writes Transformer models, got {type(model).__name__}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}  # a tied head once
    config = json.dumps(native.write_config(model), indent=1) + "\n"
    write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

"""Safetensors checkpoints: checked as a whole first, then streamed tensor by tensor into a model on the meta device."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unmask.files import write_atomically
from unmask.models import native
from unmask.models.pieces import Names, Piece, pieces_of
from unmask.models.sources import CONFIG, read_json
from unmask.models.tokenizer import CharTokenizer, WordTokenizer
from unmask.models.transformer import Transformer, TransformerConfig

if TYPE_CHECKING:
    from unmask.models.quantization import Quantizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BUFFERS = re.compile(r"(^|\.)(inv_freq|position_ids)$")
"""Tables some checkpoints store although they follow from the config."""
PREFIXES = {"model.language_model.": "model.", "model.lm_head.": "lm_head."}
"""Longer beginnings of names, of checkpoints saved from a model that wraps the language model."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"F8_E4M3": 1, "F8_E5M2": 1}
"""Of one number of a weight; those of 8 bits are counted, and refused where a model is loaded."""


@dataclass(frozen=True)
class Stored:
    """The file of a tensor, its name there, and its header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]

    @property
    def is_weight(self) -> bool:
        """Whether it holds numbers of a model; tables of integers and packed numbers are none."""
        return self.dtype in BYTES


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
    """Every stored tensor by its name, of which :data:`PREFIXES` are shortened.

    Raises ValueError for damaged files and names stored twice.
    """
    stored: dict[str, Stored] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                short = name
                for prefix, plain in PREFIXES.items():
                    short = plain + name.removeprefix(prefix) if name.startswith(prefix) else short
                if short in stored:
                    raise ValueError(f"tensor {short!r} is in both {stored[short].file.name} and {path.name}")
                piece = file.get_slice(name)
                stored[short] = Stored(path, name, tuple(piece.get_shape()), piece.get_dtype())
    return stored


def some(names: set[str]) -> str:
    """The first names of a set, for an error message."""
    listed = ", ".join(sorted(names)[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"


def check_headers(
    stored: Mapping[str, Stored], names: Names, shapes: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    """Raise ValueError naming what in a checkpoint's headers differs from what the model needs."""
    if missing := set(names) - set(stored):
        raise ValueError(f"{where} lacks {len(missing)} tensors the config calls for: {some(missing)}")
    if extra := {name for name in set(stored) - set(names) if not BUFFERS.search(name)}:
        raise ValueError(f"{where} has {len(extra)} tensors the config does not call for: {some(extra)}")
    for theirs, ours in names.items():
        entry, last = stored[theirs], pieces_of(ours)[-1]
        shape = last.stored_shape(shapes[last.parameter])
        if entry.shape != shape:
            raise ValueError(f"{entry.file}: tensor {theirs!r} has shape {entry.shape}, the config calls for {shape}")
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{entry.file}: tensor {theirs!r} is stored as {entry.dtype}; supported: {', '.join(DTYPES)} "
                "(quantised checkpoints are not)"
            )


def read_tensors(entries: Iterable[Stored]) -> Iterator[tuple[Stored, Tensor]]:
    """Tensors in the order of ``entries``, each to be dropped before the next.

    What is read of a mapped file stays in memory until it is closed. So it is opened anew before more is read than
    the largest tensor takes, which has to fit anyway; opening it for every tensor would parse its header each time.
    """
    entries = list(entries)
    most = max((entry.size for entry in entries), default=0)
    path: Path | None = None
    file: Any = None
    read = 0
    with ExitStack() as stack:
        for entry in entries:
            read += entry.size
            if entry.file != path or read > most:
                stack.close()
                path, read, file = entry.file, entry.size, stack.enter_context(opened(entry.file))
            yield entry, file.get_tensor(entry.name)


class StoredWeights(Mapping[str, Tensor]):
    """A model's parameters in a checkpoint; those that :meth:`stream` leaves there are read whenever they are used.

    Only headers are read at first. ValueError or FileNotFoundError is raised unless the checkpoint holds exactly what
    ``model``, on the meta device, needs. ``names_of`` gives the :data:`Names` for a configuration and the names in a
    checkpoint.
    """

    def __init__(
        self, model: Transformer, folder: Path, names_of: Callable[[TransformerConfig, Collection[str]], Names]
    ) -> None:
        stored = read_headers(find_shards(folder))
        names, tied = names_of(model.config, stored), model.config.tie_embeddings
        copies: list[Stored] = []
        if tied:  # a stored copy of the embedding is accepted
            heads = {theirs for theirs, ours in names.items() if ours == "lm_head.weight"}
            names = {theirs: ours for theirs, ours in names.items() if theirs not in heads}
            copies = [stored.pop(name) for name in heads & stored.keys()]
        check_headers(stored, names, {name: tuple(p.shape) for name, p in model.named_parameters()}, folder)
        self.entries = {name: entry for name, entry in stored.items() if name in names}
        self.pieces = {name: pieces_of(ours) for name, ours in names.items()}
        self.left: dict[str, Tensor] = {}
        """What each parameter left in the checkpoint is like, on the meta device."""
        self.sources: dict[str, list[tuple[Stored, Piece]]] = {}
        for name, entry in self.entries.items():
            for piece in self.pieces[name]:
                self.sources.setdefault(piece.parameter, []).append((entry, piece))
        if tied:
            self.sources["lm_head.weight"] = self.sources["embed.weight"]
        for copy in copies:
            embedding = self.sources["embed.weight"][0][0]
            same = copy.dtype == embedding.dtype and torch.equal(*(t for _, t in read_tensors((embedding, copy))))
            if not same:
                raise ValueError(f"{folder}: the config ties the head to the embedding, but {copy.name!r} differs")

    def stored_dtype(self, parameter: str) -> torch.dtype:
        return DTYPES[self.sources[parameter][0][0].dtype]

    def stream(
        self, model: Transformer, place: Callable[[str], torch.device | None], quantizer: Quantizer | None = None
    ) -> None:
        """Fill ``model`` one stored tensor at a time, in the order of the files, each read from front to back.

        ``place`` gives the device of a parameter, or None to leave it on the meta device. What ``quantizer`` takes is
        quantised as it is read, and a stack of experts becomes a list of matrices.
        """
        made: dict[str, Tensor] = {}
        few_bits: dict[str, dict[int, nn.Parameter]] = {}
        self.left = dict(model.named_parameters(remove_duplicate=False))
        here = {
            entry: [piece for piece in self.pieces[name] if place(piece.parameter) is not None]
            for name, entry in self.entries.items()
        }
        for entry, source in read_tensors(entry for entry, pieces in here.items() if pieces):
            for piece in here[entry]:
                name = piece.parameter
                if quantizer is not None and quantizer.takes(name, self.left[name]):
                    matrices = quantizer.matrices(name, piece.of(source))
                    few_bits.setdefault(name, {}).update(enumerate(matrices, start=piece.expert or 0))
                    continue
                if name not in made:
                    made[name] = torch.empty_like(self.left[name], device=place(name))
                piece.copy(source, made[name])
            del source
        filled: dict[str, nn.Parameter | nn.ParameterList] = {
            name: nn.Parameter(tensor, requires_grad=False) for name, tensor in made.items()
        }
        for name, parts in few_bits.items():
            stacked = self.left[name].ndim == 3
            filled[name] = nn.ParameterList(parts[i] for i in sorted(parts)) if stacked else parts[0]
        for name, value in filled.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(value, nn.ParameterList):  # no module may take the place of a parameter
                delattr(module, leaf)
            setattr(module, leaf, value)
        model.tie_weights()
        self.left = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}

    def __getitem__(self, parameter: str) -> Tensor:
        tensor = torch.empty_like(self.left[parameter], device="cpu")
        pieces = dict(self.sources[parameter])
        for entry, source in read_tensors(pieces):
            pieces[entry].copy(source, tensor)
            del source
        return tensor

    def __contains__(self, parameter: object) -> bool:
        return parameter in self.left

    def __iter__(self) -> Iterator[str]:
        return iter(self.left)

    def __len__(self) -> int:
        return len(self.left)


def save_model(model: Transformer, folder: str | Path, tokenizer: CharTokenizer | WordTokenizer | None = None) -> None:
    """Write a :class:`Transformer`, wherever it came from, in this project's format; ``load_model(folder)`` reads it.

    Every file is replaced atomically. TypeError is raised for models that are no Transformer, ValueError for
    quantised ones, for weights on the disk, and for a folder with a checkpoint in several files.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"save_model writes Transformer models, got {type(model).__name__}")
    if model.quantization is not None:
        raise ValueError(f"save_model writes no quantised weights, got quantization={model.quantization!r}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("save_model writes weights that are in memory, but some were left on the disk by device_map")
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise ValueError(f"{folder} has a checkpoint in several files, by {INDEX}: save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}  # a tied head once
    config = json.dumps(native.write_config(model), indent=1) + "\n"
    write_atomically(folder / WEIGHTS, lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

"""Reading and writing policies: a folder with ``config.json`` and ``model.safetensors``.

Two formats are read. Ours, which is also what is written, stores every field of the configuration and tensors under
the module's parameter names. The published reference format prefixes the names with ``base_policy.``, adds a buffer
``inv_freq``, and says nothing about shapes in its configuration: sizes come from the tensors.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unmask.config import check_known
from unmask.files import make_folder, write_atomically
from unmask.models.sources import read_json
from unmask.ops.reference.policy_forward import rotary_frequencies
from unmask.policies.config import PolicyConfig
from unmask.policies.network import PolicyNetwork

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1

PUBLISHED_PREFIX = "base_policy."
PUBLISHED_DEFAULT_HEADS = 2
_INV_FREQ = "transformer_blocks.0.inv_freq"
_SIZES = ("hidden_size", "ffn_size", "num_confidences", "num_layers", "vocab_size", "embedding_size")
# Bookkeeping that the transformers library writes into a config.json; none of it changes what a policy computes.
_HUB_KEYS = {
    "_attn_implementation", "_commit_hash", "_name_or_path", "architectures", "auto_map", "dtype", "id2label",
    "label2id", "model_type", "output_attentions", "output_hidden_states", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class CheckpointError(ValueError):
    """A policy checkpoint that cannot be used; the message names the file and what is wrong with it."""


def packaged_policies() -> dict[str, Path]:
    """Folders of the packaged policies by name (``_`` reads as ``-``)."""
    folders = sorted(path.parent for path in Path(__file__).parent.glob(f"*/{CONFIG_FILE}"))
    return {folder.name.replace("_", "-"): folder for folder in folders}


def resolve(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Folder of a policy given as a local folder, the name of a packaged policy, or a Hugging Face hub id.

    As with models, a packaged name wins over a folder of that name; write ``./tiny`` for the folder.
    Raises FileNotFoundError if there is no such policy, ImportError if the hub is needed without ``huggingface_hub``.
    """
    text, folder = os.fspath(name), Path(name).expanduser()
    if isinstance(name, str) and (packaged := packaged_policies().get(text.replace("_", "-"))):
        return packaged
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise FileNotFoundError(f"policy {text!r}: no such folder, no packaged policy, and not a hub id (user/name)")
    return _download(text, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"policy {repo_id!r} is not a local folder; to fetch it from the hub, `pip install huggingface_hub`"
        ) from error
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"policy {repo_id!r}: no such local folder, and not fetched from the hub: {error}"
        ) from error
    return Path(folder)


def save(folder: str | os.PathLike[str], network: Any) -> None:
    """Write ``network`` to ``folder`` (made if needed) in float32; each file is replaced in one piece."""
    folder = Path(folder)
    make_folder(folder)
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in network.state_dict().items()}
    config = {"model_type": network.model_type, "format_version": FORMAT_VERSION, **network.config.to_dict()}
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def model_type(folder: Path) -> str:
    """The kind of policy in ``folder`` by its configuration; "" if that says nothing. Errors as for :func:`load`."""
    return str(_read_config(folder / CONFIG_FILE).get("model_type", ""))


def load(folder: str | os.PathLike[str], kind: type[Any] = PolicyNetwork) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and float32 tensors, under the module's names, of a checkpoint of either format for a ``kind``.

    Raises FileNotFoundError for a missing folder or file, CheckpointError for one that is damaged or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    values = _read_config(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    tensors = _read_tensors(path)
    try:
        if any(name.startswith(PUBLISHED_PREFIX) for name in tensors):
            config, tensors = _published(values, tensors, path)
        else:
            config = _own_config(values, kind)
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from error
    _check_sizes(config, tensors, folder / CONFIG_FILE)
    _check_tensors(config, tensors, path, kind)
    return config, {name: t.to(torch.float32) for name, t in tensors.items()}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a policy folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a policy folder has {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from error


def _own_config(values: dict[str, Any], kind: type[Any]) -> Any:
    values = dict(values)
    found, version = values.pop("model_type", None), values.pop("format_version", None)
    if found != kind.model_type:
        raise ValueError(f"model_type must be {kind.model_type!r}, got {found!r}; load_policy reads every kind")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
    return kind.config_type.from_dict(values)


def _published(
    values: dict[str, Any], tensors: dict[str, Tensor], path: Path
) -> tuple[PolicyConfig, dict[str, Tensor]]:
    """Configuration and renamed tensors of a checkpoint in the published format."""
    foreign = sorted(name for name in tensors if not name.startswith(PUBLISHED_PREFIX))
    if foreign:
        raise CheckpointError(f"{path}: unexpected tensors without the prefix {PUBLISHED_PREFIX}: {', '.join(foreign)}")
    tensors = {name.removeprefix(PUBLISHED_PREFIX): t for name, t in tensors.items()}
    known = {f.name for f in fields(PolicyConfig)}
    check_known(set(values) - _HUB_KEYS, known, "PolicyConfig fields")
    inv_freq = tensors.pop(_INV_FREQ, None)
    sizes = {
        "hidden_size": _matrix(tensors, "mask_embedding.weight", path)[1],
        "num_confidences": _matrix(tensors, "confidence_proj.weight", path)[1],
        "ffn_size": _matrix(tensors, "transformer_blocks.0.linear1.weight", path)[0],
    }
    stated = {key: values[key] for key in known & set(values)}
    wrong = [f"{key} {stated[key]!r} (tensors: {size})" for key, size in sizes.items() if stated.get(key, size) != size]
    if wrong:
        raise ValueError(f"sizes that differ from the tensors: {', '.join(wrong)}")
    config = PolicyConfig(**{"num_heads": PUBLISHED_DEFAULT_HEADS, **sizes, **stated})
    if inv_freq is not None:
        _check_rotary(inv_freq, config, path)
    return config, tensors


def _matrix(tensors: dict[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{path}: missing tensor {PUBLISHED_PREFIX}{name}")
    if tensor.dim() != 2:
        raise CheckpointError(f"{path}: {PUBLISHED_PREFIX}{name} must have two dimensions, got {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _check_rotary(inv_freq: Tensor, config: PolicyConfig, path: Path) -> None:
    """Refuse other frequencies than those of :class:`PolicyNetwork`, which computes its own."""
    expected = rotary_frequencies(config.head_dim)
    name = f"{PUBLISHED_PREFIX}{_INV_FREQ}"
    if inv_freq.shape != expected.shape:
        raise CheckpointError(
            f"{path}: {name} has shape {tuple(inv_freq.shape)}, but {config.num_heads} heads of {config.head_dim} need "
            f"{tuple(expected.shape)}; state num_heads in {CONFIG_FILE}"
        )
    tolerance = 1e-5 if inv_freq.dtype == torch.float32 else 1e-2  # half precision rounds its copy
    if not torch.allclose(inv_freq.float(), expected, rtol=tolerance, atol=0.0):
        raise CheckpointError(f"{path}: {name} is not that of a rotary embedding with base 10000")


def _check_sizes(config: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse a network that is larger than all its tensors, before it is built."""
    largest = max((len(tensors), *(size for tensor in tensors.values() for size in tensor.shape)))
    own = getattr(config, "embedding_size", None) is None  # else the model holds the table of V rows
    for name in _SIZES:
        size = getattr(config, name, None) or 0
        if size > largest and (own or name != "vocab_size"):
            raise CheckpointError(f"{path}: {name}={size} is larger than any tensor in {WEIGHTS_FILE}")


def _check_tensors(config: Any, tensors: dict[str, Tensor], path: Path, kind: type[Any]) -> None:
    # Only the shapes are needed, but the first use of the meta device imports for seconds.
    with torch.random.fork_rng(devices=[]):
        expected = {name: t.shape for name, t in kind(config).state_dict().items()}
    problems = []
    if missing := sorted(set(expected) - set(tensors)):
        problems.append(f"missing tensors: {', '.join(missing)}")
    if extra := sorted(set(tensors) - set(expected)):
        problems.append(f"unexpected tensors: {', '.join(extra)}")
    for name in sorted(set(expected) & set(tensors)):
        tensor = tensors[name]
        if tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected a floating type")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")

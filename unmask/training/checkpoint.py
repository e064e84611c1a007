"""Checkpoints of a training run, written atomically; a resumed run continues bit for bit.

All randomness of a run is keyed by its seed and the iteration, so there are no generators to save. The policy, the
optimizer's moments and the iteration determine what comes next.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.files import write_atomically
from unmask.models.sources import read_json
from unmask.policies.pretrained import Pretrained
from unmask.training.record import learned_from
from unmask.training.run_config import RunConfig

POLICY, OPTIMIZER, STATE, TENSORS = "policy", "optimizer.safetensors", "state.json", "tensors.safetensors"
Optimizers = Sequence[torch.optim.Optimizer]
_NAME = re.compile(r"step-(\d+)")

logger = logging.getLogger(__name__)


class DamagedCheckpoint(ValueError):
    """A checkpoint with a file that cannot be read."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in (output_dir / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save(
    output_dir: Path,
    iteration: int,
    policy: Pretrained,
    optimizers: Optimizers,
    config: RunConfig,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint after ``iteration`` iterations and delete older ones than
    ``save_total_limit``, and later ones of a run that went on from an earlier checkpoint.

    ``state`` goes to a JSON file, ``tensors`` are what else the run needs.
    """
    folder = output_dir / "checkpoints" / f"step-{iteration:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial / POLICY)
    write_atomically(partial / OPTIMIZER, lambda path: save_file(optimizer_tensors(optimizers), path))
    if tensors is not None:
        whole = {name: value.contiguous() for name, value in tensors.items()}
        write_atomically(partial / TENSORS, lambda path: save_file(whole, path))
    content = {"iteration": iteration, "config": config.to_dict(), **state}
    (partial / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for path in (*partial.rglob("*"), partial):  # the files, then their folders
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)  # the checkpoint appears whole
    _flush(folder.parent)
    known = checkpoints(output_dir)
    here = known.index(folder)  # what is behind it was there when the run went on from an earlier one
    for old in known[: here + 1][: -config.save_total_limit] + known[here + 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def find(output_dir: Path, resume: bool | str) -> Path | None:
    """The checkpoint to resume from; None to start afresh.

    Raises FileNotFoundError for a path without a checkpoint, FileExistsError if ``resume`` is False but there is a run.
    """
    existing = checkpoints(output_dir)
    if isinstance(resume, str):
        path = Path(resume)
        if not (path / STATE).is_file():
            raise FileNotFoundError(f"resume_from_checkpoint={resume!r}: no checkpoint there (it has no {STATE})")
        return path
    if resume:
        return existing[-1] if existing else None
    if existing:
        raise FileExistsError(
            f"output_dir {output_dir} already holds a run ({existing[-1].name}): resume it with "
            "resume_from_checkpoint=true, or choose another folder"
        )
    return None


def resume(output_dir: Path, policy: Pretrained, optimizers: Optimizers, config: RunConfig) -> dict[str, Any] | None:
    """Restore policy and optimizers from the checkpoint that ``config`` asks for; returns its state, None if none.

    If the last checkpoint is asked for and cannot be read, the one before it is used, with a warning.

    Raises ValueError if settings differ or no checkpoint can be read, and the errors of :func:`find`.
    """
    found = find(output_dir, config.resume_from_checkpoint)
    if found is None:
        return None
    earlier = checkpoints(output_dir)[:-1] if config.resume_from_checkpoint is True else []
    while True:
        try:
            return load(found, policy, optimizers, config)
        except DamagedCheckpoint as error:
            if not earlier:
                raise
            found = earlier.pop()
            logger.warning("%s; going on from %s", error, found.name)


def load(folder: Path, policy: Pretrained, optimizers: Optimizers, config: RunConfig) -> dict[str, Any]:
    """Restore policy and optimizers in place and return the state, with its "iteration" and "tensors".

    Raises DamagedCheckpoint if a file cannot be read, before any change, and ValueError if settings differ.
    """
    state = read_state(folder)
    try:
        tensors = load_file(folder / OPTIMIZER)
        weights = type(policy).from_pretrained(folder / POLICY).state_dict()
        further = load_file(folder / TENSORS) if (folder / TENSORS).exists() else {}
    except (ValueError, OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read: {error}") from error
    check_same_run(state["config"], config, folder)
    restore_optimizers(optimizers, tensors, folder)
    policy.load_state_dict(weights)
    return {**state, "tensors": further}


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint; DamagedCheckpoint if it cannot be read."""
    try:
        state = read_json(folder / STATE)
        return {**state, "iteration": int(state["iteration"]), "config": dict(state["config"])}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read: {error}") from error


def check(output_dir: Path, config: RunConfig, given: Mapping[str, Any]) -> None:
    """Raise the errors of :func:`resume` about folder and settings, before a model is loaded; and ValueError for
    arguments in place of settings that are not those ``given``, of which the run's state names the places."""
    found = find(output_dir, config.resume_from_checkpoint)
    own = checkpoints(output_dir)[-1:] if isinstance(config.resume_from_checkpoint, str) else []
    for folder in [*([found] if found else []), *own]:  # a run that is there is not to be mixed with another
        with contextlib.suppress(DamagedCheckpoint):
            state = read_state(folder)
            check_same_run(state["config"], config, folder)
            if (there := state.get("given", given)) != given:
                raise ValueError(f"checkpoint {folder} is of a run that was given {there or 'nothing'}, not {given}")


def check_same_run(saved: Mapping[str, Any], config: RunConfig, folder: Path) -> None:
    """Raise ValueError if a setting that affects training differs; settings that are not saved have their defaults."""
    if foreign := sorted(saved.keys() - config.to_dict().keys()):
        raise ValueError(
            f"checkpoint {folder} is of another kind of run: {foreign[0]!r} is among its settings, which "
            f"{type(config).__name__} lacks"
        )
    try:
        then = learned_from(type(config).from_dict(saved).to_dict())
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} is of a run whose settings are not valid here: {error}") from error
    now = learned_from(config.to_dict())
    if differing := [f"{k} {then[k]!r} there, {now[k]!r} here" for k in now if then[k] != now[k]]:
        raise ValueError(
            f"checkpoint {folder} is of a run with other settings: {'; '.join(differing)}; a run with others can begin "
            f"where it ended, by init_policy={folder / POLICY} and an output_dir of its own"
        )


def parts_of(optimizers: Optimizers) -> list[tuple[int, torch.optim.Optimizer]]:
    """Each optimizer with the number of its first parameter among those of all."""
    parts, first = [], 0
    for part in optimizers:
        parts.append((first, part))
        first += sum(len(group["params"]) for group in part.param_groups)
    return parts


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """The optimizers' per-parameter state as flat named tensors."""
    tensors: dict[str, Tensor] = {}
    for first, part in parts_of(optimizers):
        for i, entry in part.state_dict()["state"].items():
            tensors |= {f"{first + i}.{name}": torch.as_tensor(v).contiguous() for name, v in entry.items()}
    return tensors


def restore_optimizers(optimizers: Optimizers, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """The reverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    counts = [(first, part, sum(len(g["params"]) for g in part.param_groups)) for first, part in parts_of(optimizers)]
    expected = sum(count for _, _, count in counts)
    if state and len(state) != expected:
        raise ValueError(f"checkpoint {folder}: the optimizer has {expected} parameters, the file {len(state)}")
    for first, part, count in counts:
        own = {i - first: entry for i, entry in state.items() if first <= i < first + count}
        part.load_state_dict({"state": own, "param_groups": part.state_dict()["param_groups"]})


def _flush(path: Path) -> None:
    """Write a file's or folder's content through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

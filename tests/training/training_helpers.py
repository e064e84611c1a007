"""A small run on the packaged model: seconds, not minutes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unmask.models import load_model, load_tokenizer
from unmask.training import Trainer, TrainerConfig
from unmask.training.supervised import DistillTrainer, SetTrainer
from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig

POLICY = {"hidden_size": 16, "num_heads": 2, "ffn_size": 32, "min_frequency": 1, "max_frequency": 50, "output_bias": -1}
SETTINGS: dict[str, Any] = {
    "policy": POLICY, "max_completion_length": 24, "block_length": None, "policy_temperature": 1.0,
    "num_generations": 4, "per_device_train_batch_size": 8, "iterations": 3, "warmup_steps": 0, "learning_rate": 1e-2,
    "save_steps": 1,
}  # fmt: skip


SUPERVISED: dict[str, Any] = {
    "policy": {"hidden_size": 16, "ffn_size": 32}, "max_completion_length": 24, "block_length": "full",
    "num_prompts": 6, "careful": "threshold:0.9,hold-eos", "careful_iterations": 1, "iterations": 4,
    "kept_iterations": 2, "save_steps": 1,
}  # fmt: skip
KINDS: dict[str, tuple[Any, Any]] = {
    "set": (SetTrainer, SetTrainerConfig), "distill": (DistillTrainer, DistillTrainerConfig),
}  # fmt: skip


@cache
def tiny() -> tuple[Any, Any]:
    return load_model("tiny"), load_tokenizer("tiny")


def make_config(folder: Path, **changes: Any) -> TrainerConfig:
    return TrainerConfig.from_dict({**SETTINGS, "output_dir": str(folder), **changes})


def make_trainer(folder: Path, trainer_arguments: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    model, tokenizer = tiny()
    return Trainer(make_config(folder, **changes), model=model, tokenizer=tokenizer, **(trainer_arguments or {}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same_policy(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].equal(second[name]), name


class OneOfMany:
    """What a process among others sees of them, if they do as it does."""

    device, is_main = torch.device("cpu"), False

    def __init__(self, count: int, index: int) -> None:
        self.count, self.index = count, index

    def mean_of(self, values: dict[str, float]) -> dict[str, float]:
        return values

    def maximum(self, value: float) -> float:
        return value

    def wait(self) -> None:
        pass


class Killed(Exception):
    """As if the process had been killed."""


def kill_after_3(iteration: int, values: dict[str, float]) -> None:
    """Called with what is logged, before the checkpoint of that round."""
    if iteration == 3:
        raise Killed

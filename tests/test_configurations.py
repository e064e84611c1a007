"""Configurations: what they take, what they refuse, and the one line in which they say so."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from unmask import SamplerConfig
from unmask.config import Config, Count, PositiveInt, Range, UnknownName, checked


class Pair(Config):
    """A configuration with all that can be wrong with one."""

    RENAMED = {"largest": "high"}

    low: Count
    high: PositiveInt | None = None
    span: Count | Range = 0
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("max_new_tokens", True, "max_new_tokens must be an integer, got True"),
        ("max_new_tokens", 8.0, "max_new_tokens must be an integer, got 8.0"),
        ("max_new_tokens", "5", "max_new_tokens must be an integer, got '5'"),
        ("max_new_tokens", np.bool_(True), "max_new_tokens must be an integer, got True"),
        ("block_length", -4, "block_length must be at least 1, got -4"),
        ("block_length", "half", "block_length must be an integer, got 'half'"),
        ("temperature", -1.0, "temperature must be at least 0, got -1.0"),
        ("temperature", math.nan, "temperature must be a finite number, got nan"),
        ("policy_temperature", 0.0, "policy_temperature must be at least 1e-30, got 0.0"),
        ("policy_scale", math.inf, "policy_scale must be at most 1e+30, got inf"),
        ("actions", "magic", "actions must be 'bernoulli-argmax', 'bernoulli', 'greedy' or 'dpls', got 'magic'"),
        ("alpha", "1", "alpha must be a number, got '1'"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("seed", 2**63, "seed must be less than 9223372036854775808, got 9223372036854775808"),
        ("seed", True, "seed must be an integer, got True"),
        ("cache", "suffix", "cache must be 'auto', 'none', 'exact', 'prefix' or 'dual', got 'suffix'"),
        ("cache_refresh", 0, "cache_refresh must be at least 1, got 0"),
        ("stop_at_eos", "no", "stop_at_eos must be true or false, got 'no'"),
        ("cuda_graphs", 1, "cuda_graphs must be true or false, got 1"),
        ("blok_length", 8, "unknown SamplerConfig fields ['blok_length']; did you mean block_length?"),
        (
            "do_sample",
            True,
            "unknown SamplerConfig fields ['do_sample']; for do_sample use temperature, above 0 to draw tokens",
        ),
        ("gen_length", 8, "unknown SamplerConfig fields ['gen_length']; for gen_length use max_new_tokens"),
        (
            "max_completion_length",
            8,
            "unknown SamplerConfig fields ['max_completion_length']; for max_completion_length use max_new_tokens",
        ),
        ("alg_temp", 0.9, "unknown SamplerConfig fields ['alg_temp']; for alg_temp use policy_temperature"),
    ],
)
def test_what_a_sampler_does_not_take(field: str, value: Any, message: str) -> None:
    for make in (SamplerConfig.from_dict, SamplerConfig().updated, lambda fields: SamplerConfig(**fields)):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  (compared below)
            make({field: value})
        assert str(caught.value) == message


def test_what_a_sampler_takes() -> None:
    config = SamplerConfig(np.int64(100), np.int32(32), temperature=np.float32(0.5), alpha=3, cuda_graphs=None)
    assert (config.max_new_tokens, config.block_length, config.temperature) == (100, 32, 0.5)
    assert [type(value) for value in (config.max_new_tokens, config.temperature, config.alpha)] == [int, float, float]
    assert SamplerConfig(block_length="full").block_length is None  # type: ignore[arg-type]
    assert config.updated({"block_length": "full", "seed": 2**63 - 1}).seed == 2**63 - 1
    assert SamplerConfig.from_dict(config.to_dict()) == config == pickle.loads(pickle.dumps(config))
    assert config.updated({}) is config
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "low is missing"),
        ({"low": 3, "high": 2}, "low=3 is above high=2"),
        ({"low": -1, "high": 0}, "low must be at least 0, got -1; high must be at least 1, got 0"),
        ({"low": 0, "span": "wide"}, "span must be an integer or a list, got 'wide'"),
        ({"low": 0, "span": [3, 1]}, "span must be an integer or a pair (low, high) with 0 <= low <= high, got (3, 1)"),
        ({"low": 0, "names": ["a", 2]}, "names must be a text, got 2"),
        ({"low": 0, "largest": 3}, "unknown Pair fields ['largest']; for largest use high"),
        ({"low": 0, "hihg": 3, 5: 1}, "unknown Pair fields ['5', 'hihg']; did you mean high?"),
        ({"low": 0, "other": 3}, "unknown Pair fields ['other']; known are low, high, span, names"),
    ],
)
def test_every_mistake_is_one_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Pair.from_dict(values)
    assert str(caught.value) == message
    assert isinstance(caught.value, TypeError) == isinstance(caught.value, UnknownName) == ("unknown" in message)


def test_values_by_position_are_named_too() -> None:
    assert Pair(1, 2, [0, 3], ["a"]) == Pair(low=1, high=2, span=(0, 3), names=("a",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^high must be at least 1, got 0$"):
        Pair(1, 0)


def test_a_single_value() -> None:
    assert checked("length", np.int64(3), PositiveInt) == 3
    config = SamplerConfig(
        max_new_tokens=torch.tensor(16), stop_ids=np.array([3, 4]), temperature=0.5, top_k=np.uint8(3)
    )
    assert (config.max_new_tokens, config.stop_ids, config.top_k) == (16, (3, 4), 3)
    with pytest.raises(ValueError, match=r"^length must be at least 1, got 0$"):
        checked("length", 0, PositiveInt)

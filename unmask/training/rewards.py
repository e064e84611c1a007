"""Rewards of rollouts: the value of the answer, discounted by the forwards it took."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.tasks.base import Problem

RewardFunction = Callable[..., "Sequence[float]"]
"""``f(prompts, completions, **columns) -> list[float]``, one number per completion; see :func:`score`."""


def multiplicative(correct: Tensor, steps: Tensor, length: Tensor | int, alpha: Tensor | float) -> Tensor:
    """``correct * ((L - min(steps, L) + 1) / L) ** alpha`` (arXiv 2512.09106, the paper's reward).

    Args:
        correct: (N,) the grade of the answer, 1 or 0 for an exact grader.
        steps: (N,) forwards taken (NFE).
        length: L, tokens in the buffer, an integer or (N,): for texts with holes, the number of the holes.
        alpha: >= 0, a number or (N,); 0 rewards accuracy alone.

    Raises ValueError for shapes that differ, a length that is no positive integer, or an alpha below 0 or not finite.
    """
    correct, steps, length, power = _check(correct, steps, length, alpha)
    return correct * ((length - steps.minimum(length) + 1) / length) ** power


def additive(correct: Tensor, steps: Tensor, length: Tensor | int, alpha: Tensor | float) -> Tensor:
    """``correct - alpha * steps / L``, the paper's ablation. It rewards speed even if the answer is wrong.

    Arguments and errors are those of :func:`multiplicative`.
    """
    correct, steps, length, weight = _check(correct, steps, length, alpha)
    return correct - weight * steps / length


ROLLOUT_COLUMNS = ("steps", "length", "alpha")
"""What a reward function is told of the rollouts, beside what the problems hold."""

REWARDS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "multiplicative": multiplicative,
    "additive": additive,
    "plain": lambda correct, steps, length, alpha: correct.double(),  # the reward functions' own value
}
"""How correctness and speed become one number, under the names that configurations use."""


def columns_of(problems: Sequence[Problem], told: Mapping[str, Sequence[object]]) -> dict[str, Sequence[object]]:
    """The columns for reward functions: the problems' ``answer``, what is ``told`` of their rollouts, and metadata that
    all have."""
    columns: dict[str, Sequence[object]] = {"answer": [p.answer for p in problems], **told}
    shared = set.intersection(*(set(p.metadata) for p in problems)) - {*columns, "prompts", "completions"}
    return columns | {name: [p.metadata[name] for p in problems] for name in sorted(shared)}


def check_reward_function(function: Any, columns: Mapping[str, object]) -> None:
    """Raise TypeError for what cannot be called with ``prompts``, ``completions`` and ``columns``."""
    name = getattr(function, "__name__", repr(function))
    if not callable(function):
        raise TypeError(f"reward {name} must be a function, got {type(function).__name__}")
    try:
        inspect.signature(function).bind(prompts=[], completions=[], **columns)
    except TypeError as error:
        raise TypeError(
            f"reward function {name} must take prompts, completions and **columns ({', '.join(columns)}), but {error}"
        ) from None
    except ValueError:  # without a signature, as some functions of C
        pass


def score(
    functions: Sequence[RewardFunction],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: dict[str, Sequence[object]],
) -> list[float]:
    """The sum of all functions, each called once with every completion, as in trl.

    ``columns`` are lists with one entry per completion: the problems' ``answer`` and metadata, and ``steps``,
    ``length`` and ``alpha`` of the rollouts.

    Raises ValueError if a function does not return one finite number per completion, RuntimeError from its error if it
    fails; both name it.
    """
    total = [0.0] * len(completions)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        try:
            returned = function(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            raise RuntimeError(f"reward function {name} failed: {type(error).__name__}: {error}") from error
        returned = returned.tolist() if hasattr(returned, "tolist") else returned  # a tensor's or an array's
        if not isinstance(returned, Iterable) or isinstance(returned, (str, Mapping)):
            if inspect.iscoroutine(returned):
                returned.close()
            raise ValueError(f"reward function {name} must return a list of numbers, got {returned!r}")
        values = list(returned)
        if len(values) != len(completions):
            raise ValueError(f"reward function {name} returned {len(values)} values for {len(completions)} completions")
        for i, value in enumerate(values):
            number = math.nan
            with contextlib.suppress(TypeError, ValueError, RuntimeError):  # a tensor of several numbers, for instance
                number = float(value) if hasattr(value, "__float__") else math.nan
            if not math.isfinite(number):
                raise ValueError(f"reward function {name} returned {value!r} for completion {i}: not a finite number")
            total[i] += number
    return total


def _check(correct: Tensor, steps: Tensor, length: Tensor | int, alpha: Tensor | float) -> tuple[Tensor, ...]:
    """The arguments as floating tensors on one device, float64 if ``correct`` is, else float32."""
    lengths = torch.as_tensor(length, device=correct.device)
    if lengths.is_floating_point() or lengths.shape not in ((), correct.shape) or not bool((lengths >= 1).all()):
        raise ValueError(
            f"length must be a positive integer, got {length!r}, or one for each of {tuple(correct.shape)}"
        )
    if correct.shape != steps.shape:
        raise ValueError(f"correct {tuple(correct.shape)} and steps {tuple(steps.shape)} must have one shape")
    dtype = torch.float64 if correct.dtype == torch.float64 else torch.float32
    power = torch.as_tensor(alpha, dtype=dtype, device=correct.device)
    if power.shape not in ((), correct.shape):
        raise ValueError(f"alpha must be a number or have shape {tuple(correct.shape)}, got {tuple(power.shape)}")
    if not bool(((power >= 0) & power.isfinite()).all()):
        raise ValueError(f"alpha must be finite and not negative, got {alpha}")
    return correct.to(dtype), steps.to(dtype), lengths.to(dtype), power

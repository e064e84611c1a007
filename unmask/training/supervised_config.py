"""Everything that determines a run of ``unmask train set`` or ``unmask train distill``.

Names are those of TrainerConfig for the same things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from unmask.config import Chance, Count, NonNegative, Positive, PositiveInt, Range, Text, require
from unmask.policies.config import PolicyConfig, SetPolicyConfig
from unmask.training.config_files import CONFIGS
from unmask.training.run_config import RunConfig

if TYPE_CHECKING:
    from torch import Tensor


class SupervisedConfig(RunConfig):
    """Settings of one run without rewards; see :class:`RunConfig`."""

    SHAPE: ClassVar[tuple[str, ...]]
    """Fields of the policy's configuration that a run may choose."""
    NOTED: ClassVar[Mapping[str, Any]]
    """Its fields that say how a policy was trained here."""

    prompts: str | None = None
    """A file of prompts in place of the task: one per line, or in a .jsonl file one object with a "prompt"."""

    num_prompts: PositiveInt = 64
    """Prompts decoded in a round."""
    max_states: PositiveInt = 1024
    """States of a round that are learned from, at most."""
    rollout_batch_size: PositiveInt | None = 256
    """Rows decoded side by side; None: all."""
    labels: Literal["survival", "agreement", "answer"] = "survival"
    """What a proposal of a state should do. "survival": be the final token of a careful decode that goes on from there,
    with a set of other proposals committed; each state costs one. "agreement": be the final token of one careful decode
    of the prompt, which is cheap and right where there is one right answer; states that have left it are left out.
    "answer", for set policies and tasks that grade: the policy's own set should leave the grade of a careful decode as
    it was; see :mod:`unmask.training.answers`. Then ``careful_iterations`` and ``extra`` do not matter."""
    careful: str = "threshold:0.99,hold-eos"
    """The rule of careful decodes, which also visit states."""
    careful_iterations: Count = 6
    """First rounds, whose states and sets are all those of careful decodes. Then half are the policy's own."""
    extra: Count = 6
    """A set of a careful decode has all proposals more probable than 0.97, and up to so many more."""

    iterations: PositiveInt = 40
    kept_iterations: PositiveInt = 12
    """Rounds whose states are learned from."""
    num_iterations: PositiveInt = 3
    """Passes over ``replayed_iterations`` of the rounds kept, drawn anew, in each round."""
    replayed_iterations: PositiveInt = 2
    minibatch_size: PositiveInt = 128
    """States in a step of the optimizers."""
    learning_rate: NonNegative = 3e-3
    """Of AdamW, for all but the layers' matrices."""
    muon_learning_rate: NonNegative = 1e-2
    """Of Muon, for the layers' matrices. Both rise for three rounds and fall to a twentieth until the end."""
    max_grad_norm: Positive = 1.0
    averaged: Chance = 0.5
    """The finished policy has the mean of the weights after each round of this last share of the run (stochastic weight
    averaging, arXiv 1803.05407); 0: the last weights."""
    save_steps: PositiveInt = 10

    def __post_init__(self) -> None:
        from unmask.policies.registry import HEURISTICS, make_policy

        wrong = sorted(set(self.policy) - set(self.SHAPE))
        require(not wrong, f"policy: {', '.join(wrong)} cannot be chosen; {', '.join(self.SHAPE)} can")
        super().__post_init__()
        require(
            self.careful.partition(":")[0] in HEURISTICS,
            f"careful must be a rule with its numbers, got {self.careful!r}",
        )
        try:
            careful = make_policy(self.careful)
        except ValueError as error:
            raise ValueError(f"careful: {error}") from error
        require(not careful.edits, f"careful must not revise tokens, got {self.careful!r}")
        graded = self.labels != "answer" or (self.POLICY is SetPolicyConfig and self.prompts is None)
        require(graded, "labels 'answer' are for set policies, and need a task that grades in place of prompts")

    @property
    def noted(self) -> dict[str, Any]:
        return {"trained_block_length": self.usual_blocks, "calibration": (), **self.NOTED}

    def dials(self, share: Tensor) -> Tensor:
        """Values of the policy's dial for its own decodes and sets, at ``share`` of the way through their range."""
        raise NotImplementedError

    def pace(self, iteration: int) -> float:
        """The factor on the learning rates: three rounds of warm-up, and a linear decay to a twentieth."""
        return min(1.0, (iteration + 1) / 3) * (1 - 0.95 * iteration / self.iterations)


class SetTrainerConfig(SupervisedConfig):
    """Settings of a run that trains a set policy; see :class:`SupervisedConfig`."""

    POLICY = SetPolicyConfig
    SHAPE = (
        "hidden_size", "num_layers", "num_heads", "ffn_size", "num_confidences", "sure", "max_runs", "default_risk",
    )  # fmt: skip
    FRESH = {"vocab_size": 1}  # until the model is known
    NOTED: ClassVar[Mapping[str, Any]] = {}
    FOLDER = CONFIGS / "sets"

    output_dir: Text = "runs/set"
    risks: Range = (0.01, 1.0)
    """The policy's own decodes and sets are at risks from here, evenly in their logarithm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.risks[0] > 0, f"risks must be positive, got {self.risks}")

    def dials(self, share: Tensor) -> Tensor:
        low, high = map(math.log, self.risks)
        return (low + (high - low) * share).exp()


class DistillTrainerConfig(SupervisedConfig):
    """Settings of a run that trains a policy of single positions; see :class:`SupervisedConfig`."""

    POLICY = PolicyConfig
    SHAPE = (
        "hidden_size", "num_heads", "ffn_size", "num_confidences", "max_period", "min_frequency", "max_frequency",
        "output_bias", "context", "time", "marks_ends", "steepness", "rule_threshold", "zero_time",
        "zero_mask",
    )  # fmt: skip
    FRESH = {"time": "share", "marks_ends": True}
    NOTED = {"trained_actions": "greedy", "trained_temperature": None, "trained_alphas": None}
    FOLDER = CONFIGS / "distill"

    output_dir: Text = "runs/distill"
    thresholds: Range = (0.1, 0.99)
    """The policy's own decodes and sets commit what it puts above a threshold from here, evenly in its logit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.thresholds
        require(low > 0 and high < 1, f"thresholds must be between 0 and 1, got {self.thresholds}")

    def dials(self, share: Tensor) -> Tensor:
        low, high = (math.log(p / (1 - p)) for p in self.thresholds)
        return -(low + (high - low) * share)

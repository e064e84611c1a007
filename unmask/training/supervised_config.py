"""Everything that determines a run of ``unmask train set`` or ``unmask train distill``.

Names are those of TrainerConfig for the same things.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import Self

from unmask.config import BlockLength, Config, Count, NonNegative, Positive, PositiveInt, Range, Seed, Text, require
from unmask.policies.config import PolicyConfig, SetPolicyConfig
from unmask.training.config_files import CONFIGS, from_layers, read_layers

if TYPE_CHECKING:
    from torch import Tensor

AsTuple = BeforeValidator(lambda value: value if isinstance(value, tuple) else (value,))
Several = Field(min_length=1)


class SupervisedConfig(Config):
    """Settings of one run. Raises ValueError naming the field, its value and what was expected.

    Of several lengths, block lengths or temperatures, each round draws one.
    """

    POLICY: ClassVar[type[Any]]
    """The configuration of the policies that are trained."""
    SHAPE: ClassVar[tuple[str, ...]]
    """Its fields that a run may choose."""
    FRESH: ClassVar[Mapping[str, Any]]
    """Its fields that differ from their defaults in a fresh policy."""
    NOTED: ClassVar[Mapping[str, Any]]
    """Its fields that say how a policy was trained here."""
    FOLDER: ClassVar[Path]
    """Of the packaged configurations."""

    output_dir: Text
    """Where checkpoints, metrics and the finished policy go."""
    model: str = "tiny"
    """The frozen language model: packaged name, local folder or hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The model's dtype; None: that of its weights."""
    task: str = "hops"
    """The task whose prompts are decoded. Nothing is graded."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the task to change, such as ``{"max_hops": 5}``."""
    prompts: str | None = None
    """A file of prompts in place of the task: one per line, or in a .jsonl file one object with a "prompt"."""
    chat_template: bool | None = None
    """Put prompts as a user's messages in the tokenizer's chat template; None: if it has one and they are
    instructions."""
    system_prompt: str | None = None
    """Message before the user's, in the chat template."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Fields of the policy's configuration such as ``hidden_size``, for a fresh policy."""
    init_policy: str | None = None
    """Start from this policy of the same kind instead of a fresh one, and leave ``policy`` empty."""

    max_completion_length: Annotated[tuple[PositiveInt, ...], AsTuple, Several] = (256,)
    """L, tokens in the buffer."""
    block_length: Annotated[tuple[BlockLength, ...], AsTuple, Several] = (32,)
    """Tokens per block; None or "full": full diffusion."""
    temperature: Annotated[tuple[NonNegative, ...], AsTuple, Several] = (0.0,)
    """Temperature of the tokens."""
    max_prompt_length: PositiveInt | None = 200
    """Prompts are cut to their last tokens."""

    num_prompts: PositiveInt = 64
    """Prompts decoded in a round."""
    max_states: PositiveInt = 1024
    """States of a round that are learned from, at most."""
    rollout_batch_size: PositiveInt | None = 256
    """Rows decoded side by side; None: all."""
    labels: Literal["survival", "agreement"] = "survival"
    """What a proposal of a state should do. "survival": be the final token of a careful decode that goes on from there,
    with a set of other proposals committed; each state costs one. "agreement": be the final token of one careful decode
    of the prompt, which is cheap and right where there is one right answer; states that have left it are left out."""
    careful: str = "threshold:0.99,hold-eos"
    """The rule of careful decodes, which also visit states."""
    careful_iterations: Count = 6
    """First rounds, whose states and sets are all those of careful decodes. Then half are the policy's own."""
    extra: Count = 6
    """A set of a careful decode has all proposals more probable than 0.97, and up to so many more."""

    iterations: PositiveInt = 40
    """Rounds of decodes and updates."""
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
    seed: Seed = 0

    calibration_prompts: Count = 0
    """Prompts decoded at 24 values of the policy's dial when the run ends, in each of its settings, with and without
    hold-eos, so that ``target_nfe`` can be asked for; 0: none."""

    logging_steps: PositiveInt = 1
    """Rounds averaged in a line of the log."""
    save_steps: PositiveInt = 10
    """Rounds between checkpoints, which hold the states of the rounds kept."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept; older ones are deleted."""
    resume_from_checkpoint: bool | str = False
    """True: go on from the last checkpoint in ``output_dir``, if there is one; a path: from that checkpoint."""

    def __post_init__(self) -> None:
        from unmask.policies.registry import HEURISTICS, make_policy

        wrong = sorted(set(self.policy) - set(self.SHAPE))
        require(not wrong, f"policy: {', '.join(wrong)} cannot be chosen; {', '.join(self.SHAPE)} can")
        self.policy_config()
        require(
            self.init_policy is None or not self.policy,
            f"init_policy={self.init_policy!r} has its own shape, not policy={self.policy!r}; set policy to {{}}",
        )
        require(
            self.careful.partition(":")[0] in HEURISTICS,
            f"careful must be a rule with its numbers, got {self.careful!r}",
        )
        require(not make_policy(self.careful).edits, f"careful must not revise tokens, got {self.careful!r}")

    @property
    def noted(self) -> dict[str, Any]:
        """The fields of a policy's configuration that say how it was trained."""
        blocks = self.block_length[0] or 0 if len(set(self.block_length)) == 1 else None
        return {"trained_block_length": blocks, "calibration": (), **self.NOTED}

    def policy_config(self, **of_model: Any) -> Any:
        """The fresh policy's configuration; ValueError for a field that does not fit."""
        try:
            return self.POLICY.from_dict({**self.FRESH, **self.policy, **of_model, **self.noted})
        except ValueError as error:
            raise ValueError(f"policy: {error}") from None

    def dials(self, share: Tensor) -> Tensor:
        """Values of the policy's dial for its own decodes and sets, at ``share`` of the way through their range."""
        raise NotImplementedError

    def pace(self, iteration: int) -> float:
        """The factor on the learning rates: three rounds of warm-up, and a linear decay to a twentieth."""
        return min(1.0, (iteration + 1) / 3) * (1 - 0.95 * iteration / self.iterations)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None, origin: str = "overrides") -> Self:
        """Read a YAML file, or a packaged configuration by name; as :meth:`TrainerConfig.from_yaml`."""
        return from_layers(cls, [*read_layers(path, folder=cls.FOLDER), (origin, overrides or {})])


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
    """Where checkpoints, metrics and the finished policy go."""
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
    """Where checkpoints, metrics and the finished policy go."""
    thresholds: Range = (0.1, 0.99)
    """The policy's own decodes and sets commit what it puts above a threshold from here, evenly in its logit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.thresholds
        require(low > 0 and high < 1, f"thresholds must be between 0 and 1, got {self.thresholds}")

    def dials(self, share: Tensor) -> Tensor:
        low, high = (math.log(p / (1 - p)) for p in self.thresholds)
        return -(low + (high - low) * share)

"""Everything that determines a run of ``unmask train set``; names are those of TrainerConfig for the same things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unmask.config import BlockLength, Config, Count, NonNegative, Positive, PositiveInt, Range, require
from unmask.policies.config import SetPolicyConfig
from unmask.training.config_files import CONFIGS, from_layers, read_layers

SETS = CONFIGS / "sets"
SHAPE = ("hidden_size", "num_layers", "num_heads", "ffn_size", "num_confidences", "sure", "max_runs", "default_risk")
"""Fields of the policy that a run may choose."""
AsTuple = BeforeValidator(lambda value: value if isinstance(value, tuple) else (value,))
Several = Field(min_length=1)


class SetTrainerConfig(Config):
    """Settings of one run. Raises ValueError naming the field, its value and what was expected.

    Of several lengths, block lengths or temperatures, each round draws one.
    """

    output_dir: str = "runs/set"
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
    """Fields of :class:`unmask.policies.SetPolicyConfig` such as ``hidden_size``."""
    init_policy: str | None = None
    """Start from this set policy instead of a fresh one, and leave ``policy`` empty."""

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
    """States of a round that are labelled, at most; each costs a careful decode from there on."""
    rollout_batch_size: PositiveInt | None = 256
    """Rows decoded side by side; None: all."""
    careful: str = "threshold:0.99,hold-eos"
    """The rule by which decodes go on when a set is labelled, and visit states."""
    careful_iterations: Count = 6
    """First rounds, whose states and sets are all those of careful decodes. Then half are the policy's own."""
    risks: Range = (0.01, 1.0)
    """The policy's own decodes and sets are at risks from here, evenly in their logarithm."""
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
    seed: Count = 0

    calibration_prompts: Count = 0
    """Prompts decoded at 15 risks when the run ends, in each of its settings, with and without hold-eos, so that
    ``target_nfe`` can be asked for; 0: none."""

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

        wrong = sorted(set(self.policy) - set(SHAPE))
        require(not wrong, f"policy: {', '.join(wrong)} cannot be chosen; {', '.join(SHAPE)} can")
        self.policy_config(1, None)
        require(
            self.init_policy is None or not self.policy,
            f"init_policy={self.init_policy!r} has its own shape, not policy={self.policy!r}; set policy to {{}}",
        )
        require(
            self.careful.partition(":")[0] in HEURISTICS,
            f"careful must be a rule with its numbers, got {self.careful!r}",
        )
        require(self.risks[0] > 0, f"risks must be positive, got {self.risks}")
        require(not make_policy(self.careful).edits, f"careful must not revise tokens, got {self.careful!r}")

    def policy_config(self, vocab_size: int, embedding_size: int | None) -> SetPolicyConfig:
        """The fresh policy's configuration; ValueError for a field that does not fit."""
        blocks = self.block_length[0] or 0 if len(set(self.block_length)) == 1 else None
        own = {"vocab_size": vocab_size, "embedding_size": embedding_size, "trained_block_length": blocks}
        try:
            return SetPolicyConfig.from_dict({**self.policy, **own})
        except ValueError as error:
            raise ValueError(f"policy: {error}") from None

    def pace(self, iteration: int) -> float:
        """The factor on the learning rates: three rounds of warm-up, and a linear decay to a twentieth."""
        return min(1.0, (iteration + 1) / 3) * (1 - 0.95 * iteration / self.iterations)

    @classmethod
    def from_yaml(
        cls, path: str | Path, overrides: Mapping[str, Any] | None = None, origin: str = "overrides"
    ) -> SetTrainerConfig:
        """Read a YAML file, or a packaged configuration by name; as :meth:`TrainerConfig.from_yaml`."""
        return from_layers(cls, [*read_layers(path, folder=SETS), (origin, overrides or {})])

"""The settings that all training runs have; names follow trl's GRPOConfig where the meaning is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from unmask.config import BlockLength, Config, Count, NonNegative, PositiveInt, Seed, Text, require
from unmask.policies.config import PolicyConfig
from unmask.training.config_files import CONFIGS, from_layers, read_layers

MIXED = ("max_completion_length", "block_length", "temperature")
"""Settings of which a run may have several values."""


class RunConfig(Config):
    """Settings of one training run. Raises ValueError naming the field, its value and what was expected.

    Of several lengths, block lengths or temperatures each round draws one, and it takes the models by turns.
    """

    RENAMED = {**dict.fromkeys(("max_new_tokens", "gen_length"), "max_completion_length"), "max_steps": "iterations"}
    POLICY: ClassVar[type[Any]] = PolicyConfig
    """The configuration of the policies that are trained."""
    FRESH: ClassVar[Mapping[str, Any]] = {}
    """Its fields that differ from their defaults in a fresh policy."""
    FOLDER: ClassVar[Path] = CONFIGS
    """Of the packaged configurations."""

    output_dir: Text = "runs/policy"
    """Where checkpoints, metrics and the finished policy go."""
    model: Text | tuple[Text, ...] = "tiny"
    """The frozen language model: packaged name, local folder or hub id; or several, of which one policy learns. All are
    loaded at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The model's dtype: "float32", "bfloat16" or "float16"; None: that of its weights."""
    task: str = "hops"
    """The task whose problems the policy is trained on: its name, or module:Class for one of your own."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Fields of the task to change, such as ``{"max_hops": 5}``."""
    chat_template: bool | None = None
    """Put prompts as a user's messages in the tokenizer's chat template; None: if it has one and the prompts are
    instructions."""
    system_prompt: str | None = None
    """Message before the user's, in the chat template."""
    max_prompt_length: PositiveInt | None = 200
    """Prompts are cut to their last tokens."""
    max_completion_length: PositiveInt | tuple[PositiveInt, ...] = 256
    """L, tokens in the buffer; or several."""
    block_length: BlockLength | tuple[BlockLength, ...] = 32
    """Tokens per block; None or "full": full diffusion; or several."""
    temperature: NonNegative | tuple[NonNegative, ...] = 0.0
    """Temperature of the tokens; or several. At 0 the rollouts of a group differ only in their actions."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Fields of the policy's configuration such as ``hidden_size``, for a fresh policy."""
    init_policy: str | None = None
    """Start from this policy of the same kind (folder, packaged name or hub id) instead of a fresh one, and leave
    ``policy`` empty."""
    iterations: PositiveInt = 1000
    """Rounds of decodes, with several optimizer steps each. Other settings in steps count rounds, too."""
    seed: Seed = 0
    logging_steps: PositiveInt = 1
    """Rounds averaged in a line of the log."""
    save_steps: PositiveInt = 50
    """Rounds between checkpoints."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept; older ones are deleted."""
    calibration_prompts: Count = 0
    """Further prompts decoded at 24 values of the policy's dial when the run ends, so that ``target_nfe`` can be asked
    for; 0: none."""
    resume_from_checkpoint: bool | str = False
    """True: go on from the last checkpoint in ``output_dir``, if there is one; a path: from that checkpoint."""

    def __post_init__(self) -> None:
        from unmask.policies.options import split_options

        self.policy_config()
        empty = [name for name in ("model", *MIXED) if getattr(self, name) == ()]
        require(not empty, f"{' and '.join(empty)} must have a value, got ()")
        self.check_models(len(self.models))
        require(
            self.init_policy is None or split_options(self.init_policy)[0] == self.init_policy,
            f"init_policy={self.init_policy!r} has options: train without them, and decode with them",
        )
        require(
            self.init_policy is None or not self.policy,
            f"init_policy={self.init_policy!r} has its own shape, not policy={self.policy!r}; set policy to {{}}",
        )

    def check_models(self, count: int) -> None:
        """ValueError for a curve of forwards of several models."""
        require(
            count == 1 or not self.calibration_prompts,
            f"calibration_prompts={self.calibration_prompts}: a curve holds for one model, not for {count}; set it to "
            "0 and measure one by `unmask calibrate`",
        )

    @property
    def models(self) -> tuple[str, ...]:
        """``model`` as a tuple."""
        return several(self.model)

    @property
    def mixture(self) -> tuple[Self, ...]:
        """Every combination of lengths, block lengths and temperatures, as configurations with one of each."""
        if not any(isinstance(getattr(self, name), tuple) for name in MIXED):
            return (self,)
        combined = dict.fromkeys(product(*(several(getattr(self, name)) for name in MIXED)))
        return tuple(replace(self, **dict(zip(MIXED, values, strict=True))) for values in combined)

    def drawn(self, rng: Random) -> Self:
        """One of :attr:`mixture`, which one ``rng`` decides."""
        return replace(self, **{name: rng.choice(several(getattr(self, name))) for name in MIXED})

    @property
    def decoded(self) -> dict[str, Any]:
        """How a configuration with one of each decodes, by a SamplerConfig's names."""
        return {"max_new_tokens": self.max_completion_length, **{name: getattr(self, name) for name in MIXED[1:]}}

    @property
    def usual_blocks(self) -> int:
        """The block length of most rounds, 0 for full diffusion; of equally frequent ones the first."""
        blocks = several(self.block_length)
        return max(blocks, key=blocks.count) or 0

    @property
    def noted(self) -> dict[str, Any]:
        """The fields of a policy's configuration that say how it was trained, with which a Sampler then decodes."""
        raise NotImplementedError

    def policy_config(self, **of_model: Any) -> Any:
        """The fresh policy's configuration; ValueError for a field that does not fit."""
        try:
            return self.POLICY.from_dict({**self.FRESH, **self.policy, **of_model})
        except ValueError as error:
            raise ValueError(f"policy: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None, origin: str = "overrides") -> Self:
        """Read a YAML file, or a packaged configuration by name; ``overrides`` replace fields.

        A key ``extends`` in the file names another file, whose settings it replaces. ``origin`` names the overrides in
        messages.

        Raises FileNotFoundError if there is no such configuration, ValueError for a field that is unknown or wrong; the
        message begins with its origin.
        """
        return from_layers(cls, [*read_layers(path, folder=cls.FOLDER), (origin, overrides or {})])


def several(value: Any) -> tuple[Any, ...]:
    """``value`` if it is a tuple, else a tuple of it alone."""
    return value if isinstance(value, tuple) else (value,)

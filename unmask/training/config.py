"""Everything that determines a training run; names follow trl's GRPOConfig where the meaning is the same."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from unmask.policies.network import ACTIONS_IN_USE, PolicyConfig
from unmask.policies.registry import HEURISTICS, make_policy
from unmask.sampling.config import ACTIONS, SamplerConfig, require_choice, require_non_negative, require_positive_int
from unmask.training.config_files import find_config, packaged_configs, read_config
from unmask.training.rewards import REWARDS

TRACKERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "constant")
# What may differ when a run is resumed: it changes what is written down, not what is learned.
OBSERVATIONAL = {
    "output_dir", "resume_from_checkpoint", "report_to", "logging_steps", "save_steps", "save_total_limit",
    "replay_chunk_size",
}  # fmt: skip
EXPERT_BLOCK_LENGTH = 32
"""Of the experts' blocks where the policy has none (arXiv 2512.09106)."""

__all__ = ["OBSERVATIONAL", "TrainerConfig", "find_config", "packaged_configs"]


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of one training run. Raises ValueError naming the field, its value and what was expected."""

    output_dir: str = "runs/policy"
    """Where checkpoints, metrics and the finished policy go."""
    model: str = "tiny"
    """The frozen language model: packaged name, local folder or hub id."""
    dtype: str | None = None
    """The model's: "float32", "bfloat16" or "float16"; None: that of its weights."""
    task: str = "hops"
    """What the policy practises on."""
    task_options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the task to change, such as ``{"max_hops": 5}``."""
    chat_template: bool | None = None
    """Put prompts as a user's messages in the tokenizer's chat template; None: if it has one and the task's prompts
    are instructions."""
    system_prompt: str | None = None
    """Message before the user's, in the chat template."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Fields of :class:`unmask.policies.PolicyConfig`, of a fresh policy."""
    init_policy: str | None = None
    """Start from this learned policy (folder, packaged name or hub id) instead of a fresh one, and leave ``policy``
    empty."""

    max_completion_length: int = 256
    """L, tokens in the buffer."""
    block_length: int | None = 32
    """Tokens per block; None: full diffusion."""
    max_prompt_length: int | None = 200
    """Prompts are cut to their last tokens."""
    actions: str = "bernoulli"
    """How actions are drawn: "bernoulli" or "dpls"."""
    policy_temperature: float = 0.5
    """tau; the paper takes 0.5 for blocks of 32 and 1 for full diffusion."""
    temperature: float = 0.0
    """Of the tokens. At 0 rollouts of a group differ by their actions alone."""
    max_steps_per_rollout: int | None = None
    """Forwards after which a rollout stops; None: L."""
    cache: str = "none"
    """Reuse of keys and values while decoding: "none", "prefix" or "dual"; see :class:`unmask.SamplerConfig`."""

    num_generations: int = 8
    """G, rollouts by the policy per prompt."""
    per_device_train_batch_size: int = 16
    """Rollouts by the policy per device and iteration; a multiple of ``num_generations``."""
    rollout_batch_size: int | None = None
    """Rows decoded side by side, at least a group; None: all of them."""
    expert: str | Sequence[str] | None = None
    """Expert steering: a heuristic such as "threshold:0.9" whose rollouts join each group, or several. Heuristics from
    fast to careful show a policy with a dial both of its ends."""
    num_experts: int = 1
    """Rollouts per prompt of each expert."""
    expert_block_length: int | None = None
    """Tokens per block of the experts; divides ``block_length``. None: ``block_length``, or 32 in full diffusion."""

    imitation_steps: int = 0
    """First iterations in which the policy only learns to do as the expert does: of one, what was right; of several,
    what was better than their average, by as much as it was."""
    imitation_learning_rate: float = 3e-3

    reward: str = "multiplicative"
    """How speed enters: "multiplicative", "additive" or "plain" (not at all)."""
    alpha: float | Sequence[float] = 1.0
    """Weight of speed. From a pair (low, high) every group draws its own, evenly in log(1 + alpha): a policy with a
    dial, which needs ``policy: {alpha_conditioned: true}``."""
    balance_alphas: bool = True
    """With a range of alphas: divide rewards by their group's best. At alpha 10 rewards are a tenth of those at 0, and
    without this the slow end of the dial would outvote the fast one."""
    scale_rewards: bool = False
    """Divide advantages by their group's deviation."""

    max_steps: int = 1000
    """Iterations: rounds of rollouts, with ``num_iterations`` optimizer steps each. All other counts in steps or
    iterations are rounds, too."""
    num_iterations: int = 2
    """Optimizer steps on each round of rollouts."""
    replayed_steps: int | None = None
    """Steps replayed of each rollout, picked at random; None: all."""
    replay_chunk_size: int = 4096
    """Steps replayed at once: bounds the memory, not the result."""
    epsilon: float = 0.5
    """Clipping range of the likelihood ratio."""
    learning_rate: float = 3e-5
    dial_learning_rate: float = 1.0
    """Of the layers by which alpha enters, as a multiple of ``learning_rate``."""
    lr_scheduler_type: str = "cosine"
    """"cosine" (to 0) or "constant", after the warm-up."""
    warmup_steps: int = 100
    """Iterations of linear warm-up."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    weight_decay: float = 0.1
    max_grad_norm: float = 0.2
    """Gradients are scaled down to this norm; 0: never."""
    seed: int = 0

    logging_steps: int = 1
    """Iterations averaged in a line of the log."""
    save_steps: int = 50
    """Iterations between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted."""
    eval_steps: int = 0
    """Iterations between evaluations; 0: none."""
    eval_problems: int = 200
    """Problems of an evaluation, held out of the training problems; none is of the test problems."""
    eval_actions: str | None = None
    """How evaluations draw actions, see :class:`unmask.SamplerConfig`; None: as in training, with at least one
    position per step (of "bernoulli", "bernoulli-argmax")."""
    eval_policy_temperature: float | None = None
    """tau in evaluations; None: ``policy_temperature``."""
    eval_alphas: Sequence[float] = ()
    """Evaluated settings of a policy with a dial, where ``alpha`` is a range; none: its two ends."""
    report_to: Sequence[str] = ()
    """"tensorboard", "wandb": beside metrics.jsonl, which is always written."""
    resume_from_checkpoint: bool | str = False
    """True: go on from the last checkpoint in ``output_dir``, if there is one; a path: from that checkpoint."""

    def __post_init__(self) -> None:
        self._check_kinds()
        self._fill_in()
        self._check_numbers()
        self._check_names()
        self._check_groups()
        self._check_dial()
        self.sampler_config()  # block_length must divide max_completion_length, and so on
        self.eval_config()
        if self.experts:
            self._check_experts()

    def _check_kinds(self) -> None:
        for name in ("output_dir", "model", "task"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name in ("policy", "task_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping of fields, got {getattr(self, name)!r}")
        for name in ("scale_rewards", "balance_alphas"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.init_policy is not None and self.policy:
            raise ValueError(
                f"init_policy={self.init_policy!r} has its own shape, but there is policy={dict(self.policy)!r}; "
                "set policy to {}"
            )

    def _fill_in(self) -> None:
        """Defaults that depend on other settings."""

        def fill(name: str, value: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        fill("eval_actions", ACTIONS_IN_USE.get(self.actions))
        fill("eval_policy_temperature", self.policy_temperature)
        fill("expert_block_length", EXPERT_BLOCK_LENGTH if self.block_length is None else self.block_length)
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", (self.report_to,))

    def _check_numbers(self) -> None:
        positive = (
            "max_completion_length", "num_generations", "per_device_train_batch_size", "num_experts", "max_steps",
            "num_iterations", "replay_chunk_size", "logging_steps", "save_steps", "save_total_limit", "eval_problems",
        )  # fmt: skip
        for name in positive:
            require_positive_int(name, getattr(self, name))
        for name in (
            "block_length", "expert_block_length", "max_prompt_length", "rollout_batch_size", "replayed_steps",
            "max_steps_per_rollout",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                require_positive_int(name, getattr(self, name))
        for name in (
            "epsilon", "weight_decay", "temperature", "learning_rate", "dial_learning_rate", "imitation_learning_rate",
            "max_grad_norm",
        ):  # fmt: skip
            require_non_negative(name, getattr(self, name))
        for name in ("warmup_steps", "eval_steps", "imitation_steps", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        for name in ("adam_beta1", "adam_beta2"):
            require_non_negative(name, getattr(self, name))
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}")

    def _check_names(self) -> None:
        require_choice("reward", self.reward, tuple(REWARDS))
        require_choice("actions", self.actions, tuple(ACTIONS_IN_USE))
        require_choice("eval_actions", self.eval_actions, ACTIONS)
        require_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        if self.chat_template not in (None, True, False):
            raise ValueError(f"chat_template must be true, false or null, got {self.chat_template!r}")
        if self.dtype is not None:
            require_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        for tracker in self.report_to:
            require_choice("report_to", tracker, TRACKERS)
        for expert in self.experts:
            if not isinstance(expert, str) or expert.partition(":")[0] not in HEURISTICS:
                raise ValueError(f"expert must be a heuristic ({', '.join(HEURISTICS)}) or several, got {expert!r}")
            try:
                make_policy(expert)
            except ValueError as error:
                raise ValueError(f"expert: {error}") from error

    def _check_groups(self) -> None:
        group = self.num_generations
        if group < 2 and not self.experts:
            raise ValueError("num_generations must be at least 2: a group of 1 has nothing to compare with")
        if self.per_device_train_batch_size % group:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} is not a multiple of "
                f"num_generations={group}"
            )
        if self.rollout_batch_size is not None and self.rollout_batch_size < max(group, self.num_experts):
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} is less than a group of {max(group, self.num_experts)}, "
                "which is decoded side by side"
            )
        if self.imitation_steps and not self.experts:
            raise ValueError(f"imitation_steps={self.imitation_steps} needs an expert to imitate")
        if self.imitation_steps >= self.max_steps:
            raise ValueError(f"imitation_steps={self.imitation_steps} leaves nothing of max_steps={self.max_steps}")

    def _check_dial(self) -> None:
        if not are_numbers(self.eval_alphas) or any(a < 0 for a in self.eval_alphas):
            raise ValueError(f"eval_alphas must be a list of numbers >= 0, got {self.eval_alphas!r}")
        conditioned = self.policy_config().alpha_conditioned
        if isinstance(self.alpha, (int, float)):
            require_non_negative("alpha", self.alpha)
            return
        if not are_numbers(self.alpha) or len(self.alpha) != 2:
            raise ValueError(f"alpha must be a number or a pair (low, high), got {self.alpha!r}")
        if not 0 <= self.alpha[0] < self.alpha[1]:
            raise ValueError(f"alpha must have 0 <= low < high, got {self.alpha!r}")
        if not conditioned and self.init_policy is None:
            raise ValueError(
                f"alpha={self.alpha!r} draws a trade-off per group: set policy: {{alpha_conditioned: true}}"
            )

    def _check_experts(self) -> None:
        own, experts = self.block_length, self.expert_config().block_length
        if own is not None and experts is not None and own % experts:
            raise ValueError(
                f"expert_block_length={experts} does not divide block_length={own}: the policy could not do as the "
                "experts do"
            )

    @property
    def num_prompts(self) -> int:
        """Prompts per device and iteration."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts' names, none to several."""
        if self.expert is None:
            return ()
        return (self.expert,) if isinstance(self.expert, str) else tuple(self.expert)

    @property
    def expert_rollouts(self) -> int:
        """E, the experts' rollouts per prompt."""
        return self.num_experts * len(self.experts)

    @property
    def group_size(self) -> int:
        """G + E, rollouts per prompt."""
        return self.num_generations + self.expert_rollouts

    def policy_config(self) -> PolicyConfig:
        """The fresh policy's configuration; ValueError for unknown keys."""
        return PolicyConfig.from_dict(dict(self.policy))

    def sampler_config(self) -> SamplerConfig:
        """How the policy decodes in rollouts."""
        return SamplerConfig(
            max_new_tokens=self.max_completion_length,
            block_length=self.block_length,
            temperature=self.temperature,
            policy_temperature=self.policy_temperature,
            actions=self.actions,
            max_steps=self.max_steps_per_rollout,
            max_batch_size=self.rollout_batch_size,
            cache=self.cache,
        )

    def expert_config(self) -> SamplerConfig:
        """How the expert decodes."""
        try:
            return self.sampler_config().updated({"block_length": self.expert_block_length})
        except ValueError as error:
            raise ValueError(f"expert_block_length={self.expert_block_length}: {error}") from None

    def eval_config(self) -> SamplerConfig:
        """How the policy decodes in evaluations."""
        changes = {"actions": self.eval_actions, "policy_temperature": self.eval_policy_temperature}
        return self.sampler_config().updated(changes)

    def learning_rate_at(self, iteration: int) -> float:
        """Linear warm-up, then a half cosine to 0 at ``max_steps`` (or a constant); imitation has its own, constant."""
        if iteration < self.imitation_steps:
            return self.imitation_learning_rate
        iteration -= self.imitation_steps
        if iteration < self.warmup_steps:
            return self.learning_rate * (iteration + 1) / self.warmup_steps
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        progress = (iteration - self.warmup_steps) / max(1, self.max_steps - self.imitation_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dictionaries, numbers and strings."""
        values = asdict(self)
        return {
            k: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v for k, v in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainerConfig:
        """The configuration with these fields; unknown names raise ValueError with the nearest known one.

        Of fields that are fractions a text such as "3e-5", as YAML reads it, counts as its number.
        """
        known = {f.name: str(f.type) for f in fields(cls)}
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
                raise ValueError(f"unknown training setting {name!r}{hint}")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name, value in arguments.items():
            if isinstance(value, str) and known[name].startswith("float"):
                with contextlib.suppress(ValueError):
                    arguments[name] = float(value)
        return cls(**arguments)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainerConfig:
        """Read a YAML file, or a packaged configuration by name; ``overrides`` replace fields.

        A key ``extends`` in the file names another, whose settings it replaces; see
        :func:`unmask.training.config_files.read_config`.

        Raises:
            FileNotFoundError: no such file, nor a packaged configuration of that name.
            ValueError: not a mapping, or a field that is unknown or wrong.
            ImportError: PyYAML is not installed.
        """
        file = find_config(path)
        values = read_config(file)
        try:
            return cls.from_dict({**values, **(overrides or {})})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error


def are_numbers(values: Any) -> bool:
    """Whether ``values`` is a sequence of finite numbers."""
    return isinstance(values, Sequence) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )

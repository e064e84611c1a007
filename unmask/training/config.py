"""Everything that determines a training run; names follow trl's GRPOConfig where the meaning is the same."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from unmask.config import Count, NonNegative, Positive, PositiveInt, Range, require
from unmask.policies.config import ACTIONS_IN_USE
from unmask.sampling.config import Actions, Cache, SamplerConfig, Share
from unmask.training.config_files import find_config, packaged_configs
from unmask.training.run_config import RunConfig

# Settings that may differ when a run is resumed, because they do not affect what is learned.
OBSERVATIONAL = {
    "output_dir", "resume_from_checkpoint", "report_to", "logging_steps", "save_steps", "save_total_limit",
    "replay_chunk_size", "calibration_prompts",
}  # fmt: skip
EXPERT_BLOCK_LENGTH = 32
"""Tokens per block of the experts in full diffusion (arXiv 2512.09106)."""

REWARD_RULES = ("multiplicative", "additive", "plain")

Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
]

__all__ = ["OBSERVATIONAL", "REWARD_RULES", "TrainerConfig", "find_config", "packaged_configs"]


class TrainerConfig(RunConfig):
    """Settings of one training run. Raises ValueError naming the field, its value and what was expected."""

    RENAMED = {**RunConfig.RENAMED, "dial_learning_rate": "alpha_lr_multiplier"}

    quantization: Literal["int8", "int8-dynamic", "int4"] | None = None
    """Weights of the model's layers in few bits, through torchao."""

    actions: Literal["bernoulli", "dpls"] = "bernoulli"
    """How actions are drawn: "bernoulli" or "dpls" (dynamic Plackett-Luce)."""
    policy_temperature: Positive = 0.5
    """tau; the paper takes 0.5 for blocks of 32 and 1 for full diffusion."""
    top_k: PositiveInt | None = None
    """Draw tokens only among the k most probable, at a temperature above 0; None: all."""
    top_p: Share | None = None
    """Draw tokens only among the most probable that together have this share, at a temperature above 0; None: all."""
    max_steps_per_rollout: PositiveInt | None = None
    """Forwards after which a rollout stops; None: L."""
    cache: Cache = "none"
    """Reuse of keys and values while decoding: "none", "prefix" or "dual"; see :class:`unmask.SamplerConfig`."""

    num_generations: PositiveInt = 8
    """G, rollouts by the policy per prompt."""
    per_device_train_batch_size: PositiveInt = 16
    """Rollouts by the policy per device and iteration; a multiple of ``num_generations``."""
    rollout_batch_size: PositiveInt | None = None
    """Rows decoded side by side, at least a group; None: all of them."""
    expert: str | tuple[str, ...] | None = None
    """Expert steering: a heuristic such as "threshold:0.9,hold-eos" whose rollouts join each group, or several. Fast
    and careful ones together show a policy conditioned on alpha both ends of its range."""
    num_experts: PositiveInt = 1
    """Rollouts per prompt of each expert."""
    expert_block_length: PositiveInt | Literal["full"] | None = None
    """Tokens per block of the experts; divides ``block_length``. None: ``block_length``, or 32 in full diffusion;
    "full": the experts, too, decode in full diffusion."""

    imitation_steps: Count = 0
    """First iterations, in which the policy only imitates. Rollouts of one expert are weighted by their grades, those
    of several by their advantages where these are positive."""
    imitation_learning_rate: NonNegative = 3e-3

    reward: str | tuple[str, ...] = "multiplicative"
    """How speed enters the grade: "multiplicative", "additive" or "plain" (not at all). Or a function of your own,
    module:function, whose value is the reward as it is; with several in a list their sum, and with one of the three
    words in the list that sum takes the place of the grade."""
    alpha: NonNegative | Range = 1.0
    """Weight of speed. With a pair (low, high) every group draws its own, uniformly in log(1 + alpha); this needs a
    policy conditioned on alpha (``policy: {alpha_conditioned: true}``)."""
    balance_alphas: bool = True
    """With a range of alphas: divide rewards by their group's best. At alpha 10 rewards are a tenth of those at 0, and
    without this the low alphas would dominate."""
    scale_rewards: bool = False
    """Divide advantages by their group's standard deviation."""

    num_iterations: PositiveInt = 2
    """Optimizer steps on each round of rollouts."""
    replayed_steps: PositiveInt | None = None
    """Steps replayed of each rollout, picked at random; None: all."""
    replay_chunk_size: PositiveInt = 4096
    """Steps replayed at once. It bounds the memory and does not change the result."""
    epsilon: NonNegative = 0.5
    """Clipping range of the likelihood ratio."""
    kl_coef: NonNegative = 0.0
    """Weight in the loss of the KL divergence from the policy that the run began with, in nats per step; needs actions
    "bernoulli". With ``policy: {steepness: 4}`` a fresh policy is a rule, and keeps close to it."""
    learning_rate: NonNegative = 3e-5
    alpha_lr_multiplier: NonNegative = 1.0
    """Learning rate of the layers that read alpha, as a multiple of ``learning_rate``."""
    lr_scheduler_type: Literal["cosine", "constant"] = "cosine"
    """"cosine" (to 0) or "constant", after the warm-up."""
    warmup_steps: Count = 100
    """Iterations of linear warm-up."""
    adam_beta1: Annotated[NonNegative, Field(lt=1)] = 0.9
    adam_beta2: Annotated[NonNegative, Field(lt=1)] = 0.99
    weight_decay: NonNegative = 0.1
    max_grad_norm: NonNegative = 0.2
    """Gradients are scaled down to this norm; 0: never."""
    eval_steps: Count = 0
    """Iterations between evaluations; 0: none."""
    eval_problems: PositiveInt = 200
    """Problems per evaluation. They are held out of the training problems; none is a test problem."""
    eval_actions: Actions | None = None
    """How evaluations draw actions, see :class:`unmask.SamplerConfig`; None: as in training, but "bernoulli-argmax" in
    place of "bernoulli"."""
    eval_policy_temperature: Positive | None = None
    """tau in evaluations; None: ``policy_temperature``."""
    eval_alphas: tuple[NonNegative, ...] = ()
    """Alphas at which to evaluate; empty: ``alpha``, or its two ends if it is a range."""
    report_to: Trackers = ()
    """Trackers beside metrics.jsonl, which is always written: "tensorboard", "wandb"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixture != (self,):  # each was checked when it was made
            return
        self.sampler_config().check_draws()
        for name in ("top_k", "top_p"):
            limited = getattr(self, name) is not None and self.calibration_prompts
            require(not limited, f"{name}={getattr(self, name)} has no curve of forwards: set calibration_prompts to 0")
        self._check_groups()
        self._check_reward()
        self._check_policy()
        self._check_experts()

    def _check_groups(self) -> None:
        group, batch, experts = self.num_generations, self.per_device_train_batch_size, bool(self.experts)
        side_by_side, imitated = max(group, self.num_experts), self.imitation_steps
        require(group > 1 or experts, "num_generations must be at least 2: a group of 1 has nothing to compare with")
        require(batch % group == 0, f"per_device_train_batch_size={batch} is not a multiple of num_generations={group}")
        require(
            (self.rollout_batch_size or side_by_side) >= side_by_side,
            f"rollout_batch_size={self.rollout_batch_size} is less than a group of {side_by_side}, decoded together",
        )
        require(experts or not imitated, f"imitation_steps={imitated} needs an expert to imitate")
        require(
            imitated < self.iterations, f"imitation_steps={imitated} leaves nothing of iterations={self.iterations}"
        )

    def _check_reward(self) -> None:
        wrong = [name for name in self.reward_names if name not in REWARD_RULES and not all(name.partition(":")[::2])]
        close = difflib.get_close_matches(wrong[0], REWARD_RULES, n=1) if wrong else []
        hint = f"; did you mean {close[0]}?" if close else ""
        kinds = f"{', '.join(REWARD_RULES)} or module:function of your own"
        require(not wrong, f"reward must be {kinds}, got {wrong[:1]}{hint}")
        require(
            bool(self.reward_names) and len(self.reward_names) - len(self.reward_functions) < 2,
            f"reward must name at most one of {', '.join(REWARD_RULES)}, and something, got {self.reward!r}",
        )

    def _check_policy(self) -> None:
        conditioned = self.policy_config().alpha_conditioned or self.init_policy is not None
        require(
            not self.kl_coef or self.actions == "bernoulli",
            f"kl_coef={self.kl_coef} needs actions 'bernoulli', got {self.actions!r}",
        )
        require(
            conditioned or not isinstance(self.alpha, tuple),
            f"alpha={self.alpha} draws a trade-off per group: set policy: {{alpha_conditioned: true}}",
        )

    def _check_experts(self) -> None:
        if not self.experts:
            return
        from unmask.policies.registry import HEURISTICS, make_policy

        for expert in self.experts:
            is_rule = expert.partition(":")[0] in HEURISTICS
            require(is_rule, f"expert must be a heuristic ({', '.join(HEURISTICS)}) or several, got {expert!r}")
            try:
                make_policy(expert)
            except ValueError as error:
                raise ValueError(f"expert: {error}") from error
        own, experts = self.sampler_config().block_length, self.expert_config().block_length
        require(
            own is None or (experts is not None and own % experts == 0),
            f"expert_block_length={experts or 'full'} does not divide block_length={own}, so that the policy could not "
            "imitate them",
        )

    @property
    def num_prompts(self) -> int:
        """Prompts per device and iteration."""
        return self.per_device_train_batch_size // self.num_generations

    @property
    def experts(self) -> tuple[str, ...]:
        """``expert`` as a tuple."""
        if self.expert is None:
            return ()
        return (self.expert,) if isinstance(self.expert, str) else tuple(self.expert)

    @property
    def reward_names(self) -> tuple[str, ...]:
        """``reward`` as a tuple."""
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @property
    def reward_functions(self) -> tuple[str, ...]:
        """The functions of one's own among them, module:function."""
        return tuple(name for name in self.reward_names if name not in REWARD_RULES)

    @property
    def reward_rule(self) -> str:
        """How speed enters: a key of :data:`unmask.training.rewards.REWARDS`."""
        rules = [name for name in self.reward_names if name in REWARD_RULES]
        return rules[0] if rules else "plain"

    @property
    def expert_rollouts(self) -> int:
        """E, the experts' rollouts per prompt."""
        return self.num_experts * len(self.experts)

    @property
    def group_size(self) -> int:
        """G + E, rollouts per prompt."""
        return self.num_generations + self.expert_rollouts

    @property
    def noted(self) -> dict[str, Any]:
        alphas = {"trained_alphas": self.alpha} if isinstance(self.alpha, tuple) else {}  # else a trained policy's own
        return {
            "trained_block_length": self.usual_blocks,
            "trained_temperature": self.policy_temperature,
            "trained_actions": self.actions,
            "calibration": (),  # of weights before this training
            **alphas,
        }

    def sampler_config(self) -> SamplerConfig:
        """How the policy decodes in rollouts."""
        return SamplerConfig(
            **self.decoded,
            top_k=self.top_k,
            top_p=self.top_p,
            policy_temperature=self.policy_temperature,
            actions=self.actions,
            max_steps=self.max_steps_per_rollout,
            max_batch_size=self.rollout_batch_size,
            cache=self.cache,
        )

    def expert_config(self) -> SamplerConfig:
        """How the expert decodes."""
        own = self.block_length or EXPERT_BLOCK_LENGTH
        return self.sampler_config().updated({"block_length": self.expert_block_length or own})

    def eval_config(self) -> SamplerConfig:
        """How the policy decodes in evaluations."""
        changes = {
            "actions": self.eval_actions or ACTIONS_IN_USE[self.actions],
            "policy_temperature": self.eval_policy_temperature or self.policy_temperature,
        }
        return self.sampler_config().updated(changes)

    def learning_rate_at(self, iteration: int) -> float:
        """Linear warm-up, then a half cosine to 0 at the end (or a constant); imitation has its own, constant."""
        if iteration < self.imitation_steps:
            return self.imitation_learning_rate
        iteration -= self.imitation_steps
        if iteration < self.warmup_steps:
            return self.learning_rate * (iteration + 1) / self.warmup_steps
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        progress = (iteration - self.warmup_steps) / max(1, self.iterations - self.imitation_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

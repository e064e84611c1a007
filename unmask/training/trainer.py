"""The Trainer: rollouts, rewards, update, again (arXiv 2512.09106, section 3)."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor

from unmask.evaluation.calibrate import measure_curve
from unmask.evaluation.evaluate import answers, decode_problems, grade
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.calibration import calibrated
from unmask.policies.learned import Policy
from unmask.policies.registry import make_policy
from unmask.tasks import make_task, named
from unmask.tasks.base import Problem, Task
from unmask.training.config import TrainerConfig
from unmask.training.grpo import NO_SIGNAL, group_advantages, relative_to_best
from unmask.training.learner import Learner, parameter_groups, pick_steps
from unmask.training.metrics import SkippedRounds, describe, with_deviation
from unmask.training.problems import TrainingProblems
from unmask.training.rewards import REWARDS, ROLLOUT_COLUMNS, RewardFunction, check_reward_function, columns_of, score
from unmask.training.rollout import Collector, Rollouts, WideView
from unmask.training.run import Run
from unmask.training.run_config import several

logger = logging.getLogger(__name__)


class Trainer(Run):
    """Trains an unmasking policy on a frozen language model by GRPO.

    Example::

        policy = Trainer(TrainerConfig.from_yaml("quickstart")).train()

    Every argument but ``config`` replaces what the config names. ``reward_functions`` replace the task's grader:
    ``f(prompts, completions, **columns) -> list[float]``, summed, then discounted by speed as ``config.reward`` says.
    """

    CONFIG, POLICY = TrainerConfig, Policy

    def __init__(
        self,
        config: TrainerConfig,
        model: Any = None,
        tokenizer: Any = None,
        task: Task | None = None,
        policy: Policy | None = None,
        reward_functions: Sequence[RewardFunction] = (),
    ) -> None:
        if not isinstance(reward_functions, Sequence) or not all(callable(f) for f in reward_functions):
            raise TypeError(f"reward_functions must be a sequence of functions, got {reward_functions!r}")
        given = {"model": model, "tokenizer": tokenizer, "task": task, "policy": policy}
        given["reward_functions"] = reward_functions or None
        super().__init__(config, given, getattr(config, "report_to", None))
        self.reward_functions = tuple(reward_functions) or tuple(named(f, "reward") for f in config.reward_functions)
        # Checks come before the model, which may take long to load.
        self.task = task if task is not None else make_task(config.task, **config.task_options)
        self.problems = self._make_problems()
        self.policy = self.make_policy()
        experts = [make_policy(expert) for expert in config.experts]
        self._check_policy(experts)
        self.load(self.problems.take(0, 1)[0].given, self.task.instructions, quantization=config.quantization)
        self.settle_policy()
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.policy, config.alpha_lr_multiplier),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.optimizers = (self.optimizer,)
        self.next_problem = 0
        """Number of the first problem of the next round, over all processes."""
        self.skipped = SkippedRounds()
        self.best: dict[str, float] = {}
        every = [problem.given for problem in self.problems.known(config.num_prompts)]
        self.collectors = []
        """For each model those of all settings."""
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            own = [Collector(model, tokenizer, self.policy, one, experts) for one in config.mixture]
            self.check_holes(own[0].sampler, every, own[0].config.sampler_config())
            self.collectors.append(own)
        self.learner = Learner(self.policy, self.optimizer, config, self.processes.mean)

    def _make_problems(self) -> TrainingProblems:
        """The problems. The first are read now, so that errors appear before the model is loaded."""
        c = self.config
        if c.eval_steps or not self.reward_functions:
            self.task.check_gradable(train=True)
        problems = TrainingProblems(self.task, c.seed, c.eval_problems, hold_out=c.eval_steps > 0)
        first = problems.take(0, c.num_prompts)
        for function in self.reward_functions:
            check_reward_function(function, columns_of(first, {name: [] for name in ROLLOUT_COLUMNS}))
        return problems

    def _check_policy(self, experts: Sequence[UnmaskingPolicy]) -> None:
        if not isinstance(self.config.alpha, (int, float)) and not self.policy.conditioned:
            raise ValueError(f"alpha={self.config.alpha!r} is a range, but the policy is not conditioned on alpha")
        for expert in experts:
            WideView(expert, self.policy)  # raises for an expert that reads more than the policy

    def calibrate(self, count: int) -> None:
        problems = self.problems.take(self.next_problem, count)  # behind those of training
        asked = {"seed": 0, "max_steps": None}  # a limit of rollouts is none of decoding
        curves = []
        for collector in self.collectors[0]:
            sampler, prompts = collector.evaluating(), collector.encode([problem.given for problem in problems])
            curves.append(measure_curve(sampler, prompts, asked, f"{len(prompts)} prompts of {self.task.name}"))
        self.policy.config = calibrated(self.policy.config, tuple(curves))

    def state(self) -> tuple[dict[str, Any], None]:
        return {"best": self.best, "processes": self.processes.count, "next_problem": self.next_problem}, None

    def restore(self, state: dict[str, Any]) -> None:
        earlier = state.get("processes", self.processes.count)
        self.next_problem = state.get("next_problem", self.iteration * earlier * self.config.num_prompts)
        # Checkpoints without "next_problem" were evaluated on other problems.
        self.best = state["best"] if "next_problem" in state else {}
        if earlier != self.processes.count and self.processes.is_main:
            logger.warning(
                "the run was on %d processes and continues on %d: rounds change in size", earlier, self.processes.count
            )

    def step(self) -> dict[str, float]:
        """One iteration: rollouts, rewards, advantages, update. Returns its metrics, averaged over processes."""
        began = time.perf_counter()
        c = self.config
        first = self.next_problem + self.processes.index * c.num_prompts
        problems = self.problems.take(first, c.num_prompts)
        alpha = self.draw_alphas(first, c.num_prompts)
        seed = random.Random(f"rollouts/{c.seed}/{self.iteration}").getrandbits(62)
        imitate = self.iteration < c.imitation_steps
        collector = self.collector
        rollouts = collector.collect([p.given for p in problems], alpha, seed, first, expert_only=imitate)
        collected = time.perf_counter()
        correct, rewards = self.rewards(problems, rollouts, collector)
        for group in self.optimizer.param_groups:
            group["lr"] = c.learning_rate_at(self.iteration) * group["scale"]
        if imitate:
            worth = self.worth_imitating(rollouts, correct, rewards)
            metrics = self.learner.imitate(rollouts, worth, self.picked_samples(rollouts))
        else:
            metrics = self.update(rollouts, rewards)
        metrics["learning_rate"] = c.learning_rate_at(self.iteration)
        metrics |= describe(rollouts, correct, rewards, "worth" if self.reward_functions else "accuracy")
        metrics = with_deviation(self.processes.mean_of(metrics))
        now = time.perf_counter()
        metrics |= {
            "rollouts_per_second": rollouts.steps.shape[0] * self.processes.count / (now - began),
            "seconds_rollouts": collected - began,
            "seconds_update": now - collected,
        }
        self.iteration += 1
        self.next_problem += self.processes.count * c.num_prompts
        return metrics

    @property
    def collector(self) -> Collector:
        """That of the round to come."""
        setting = self.config.drawn(random.Random(f"setting/{self.config.seed}/{self.iteration}"))
        return next(one for one in self.collectors[self.turn] if one.config == setting)

    def worth_imitating(self, rollouts: Rollouts, correct: Tensor, rewards: Tensor) -> Tensor:
        """(N,) float32 >= 0: the weights of the experts' rollouts in imitation."""
        if len(self.config.experts) == 1:
            return correct.clamp_min(0).float()
        return self.advantages(rollouts, rewards).clamp_min(0).float()

    def advantages(self, rollouts: Rollouts, rewards: Tensor) -> Tensor:
        """(N,) float64 advantages, of rewards relative to their group's best where alphas differ."""
        if self.config.balance_alphas and not isinstance(self.config.alpha, (int, float)):
            rewards = relative_to_best(rewards, rollouts.group_size)
        return group_advantages(rewards, rollouts.group_size, self.config.scale_rewards)

    def update(self, rollouts: Rollouts, rewards: Tensor) -> dict[str, float]:
        """Update the policy, unless the advantages are zero on all processes."""
        advantages = self.advantages(rollouts, rewards)
        if self.processes.maximum(float(advantages.abs().max())) < NO_SIGNAL:
            self.learner.check_logits(rollouts, rollouts.samples)
            if self.skipped.add(rollouts) and self.processes.is_main:
                logger.warning(self.skipped.advice())
            return {"skipped": 1.0}
        self.skipped = SkippedRounds()
        statistics = self.learner.update(rollouts, advantages.float(), self.picked_samples(rollouts))
        return {"skipped": 0.0, **asdict(statistics)}

    def draw_alphas(self, first: int, count: int) -> Tensor:
        """(count,) float32: the alphas of the groups from number ``first`` on."""
        alpha = self.config.alpha
        if isinstance(alpha, (int, float)):
            return torch.full((count,), float(alpha), dtype=torch.float32)
        low, high = (torch.tensor(float(a), dtype=torch.float32).log1p() for a in alpha)
        share = [random.Random(f"alpha/{self.config.seed}/{i}").random() for i in range(first, first + count)]
        return (low + torch.tensor(share, dtype=torch.float32) * (high - low)).expm1()

    def rewards(self, problems: Sequence[Problem], rollouts: Rollouts, collector: Collector) -> tuple[Tensor, Tensor]:
        """(N,) float64: the worth of the answers, and the rewards, which depend on their speed too."""
        each = [problem for problem in problems for _ in range(rollouts.group_size)]
        return self.rewarded(each, answers(each, rollouts), rollouts.steps, rollouts.alpha, collector)

    def rewarded(
        self,
        problems: Sequence[Problem],
        completions: Sequence[Any],
        steps: Tensor,
        alpha: Tensor,
        collector: Collector,
    ) -> tuple[Tensor, Tensor]:
        """(N,) float64: what N completions are worth, by the grader or the reward functions, and their rewards."""
        length, mask = collector.config.max_completion_length, collector.sampler.model.mask_token_id
        lengths = [length if p.ids is None else list(p.ids).count(mask) for p in problems]
        if self.reward_functions:
            told = dict(zip(ROLLOUT_COLUMNS, (steps.tolist(), lengths, alpha.tolist()), strict=True))
            worth = score(self.reward_functions, [p.prompt for p in problems], completions, columns_of(problems, told))
        else:
            worth = grade(self.task, problems, completions)
        values = torch.tensor(worth, dtype=torch.float64, device=steps.device)
        return values, REWARDS[self.config.reward_rule](values, steps, torch.tensor(lengths).to(steps), alpha)

    def picked_samples(self, rollouts: Rollouts) -> Any:
        """The steps to replay: all, or ``replayed_steps`` of each rollout."""
        samples, most = rollouts.samples, self.config.replayed_steps
        if most is None:
            return samples
        seed = random.Random(f"replay/{self.config.seed}/{self.iteration}/{self.processes.index}").getrandbits(62)
        return samples.take(pick_steps(samples.rollout, most, torch.Generator().manual_seed(seed)))

    def evaluate(self) -> dict[str, float]:
        """Reward, accuracy and NFE on held-out problems at each of ``eval_alphas``.

        Of several models and settings it is their mean, and each of them too.
        Raises ValueError if none were held out: the task has a finite set of problems, and ``eval_steps`` is 0.
        """
        c = self.config
        if not self.problems.validation:
            raise ValueError("eval_steps=0 holds no problems out of the training problems to evaluate on")
        problems = self.problems.validation[self.processes.index :: self.processes.count]
        alphas = c.eval_alphas or several(c.alpha)
        labels = self.labels()
        total: dict[str, float] = {}
        for (label, collector), alpha in product(labels, alphas):
            suffixes = {"": len(labels) * len(alphas), **({label: len(alphas)} if len(labels) > 1 else {})}
            suffixes |= {f"_alpha_{alpha:g}": len(labels)} if len(alphas) > 1 else {}
            for name, value in self._evaluated(problems, float(alpha), collector).items():
                for suffix, share in suffixes.items():
                    total[f"{name}{suffix}"] = total.get(f"{name}{suffix}", 0.0) + value / share
        total = self.processes.mean_of({"problems": float(len(problems)), **total})  # parts differ in size
        count = total.pop("problems")
        return {name: value / count for name, value in total.items()}

    def labels(self) -> list[tuple[str, Collector]]:
        """Every collector, with what tells it from the others: "_model1_L64_full_T0.5"."""
        models = len(self.collectors) > 1
        return [
            (f"_model{number}" * models + f"_{one.setting}" * (len(own) > 1), one)
            for number, own in enumerate(self.collectors)
            for one in own
        ]

    def _evaluated(self, problems: Sequence[Problem], alpha: float, collector: Collector) -> dict[str, float]:
        """Sums over ``problems`` of reward, accuracy and NFE."""
        sampler, prompts = collector.evaluating(), collector.encode([p.given for p in problems])
        config = sampler.settled({"seed": 0, **({"alpha": alpha} if self.policy.conditioned else {})})
        result = decode_problems(sampler, problems, config, prompts)
        asked = torch.full(result.steps.shape, alpha, dtype=torch.float32, device=result.steps.device)
        said = answers(problems, result)
        correct, reward = self.rewarded(problems, said, result.steps, asked, collector)
        return {
            "eval_reward": reward.sum().item(),
            "eval_accuracy": sum(grade(self.task, problems, said) if self.reward_functions else correct.tolist()),
            "eval_nfe": result.steps.double().sum().item(),
        }

    def log_evaluation(self, write: Callable[[dict[str, float]], None]) -> None:
        every, now = self.config.eval_steps, self.iteration
        if not every or (now % every and now != self.config.iterations):
            return
        values = self.evaluate()
        write(values)
        if now and values["eval_reward"] > self.best.get("eval_reward", float("-inf")):
            self.best = {"iteration": float(now), **values}
            self.save_policy(self.output / "best")

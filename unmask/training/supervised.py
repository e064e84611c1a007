"""Training without reinforcement: label what is to be trusted, fit the network to it, again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unmask.config import Text, checked
from unmask.evaluation.calibrate import measure_curve
from unmask.policies.calibration import calibrated
from unmask.policies.learned import Policy
from unmask.policies.options import Options, with_options
from unmask.policies.set_policy import SetPolicy
from unmask.pretraining.optimizer import Muon, matrices_and_rest
from unmask.sampling.config import SamplerConfig
from unmask.sampling.sampler import Sampler
from unmask.tasks import make_task
from unmask.tasks.base import Holes, Problem, Task
from unmask.tasks.finite import ProblemSet
from unmask.text import parse_json, read_text
from unmask.training.answers import AnswerCollector, answer_loss, log_harmless
from unmask.training.labels import Collector, Tried
from unmask.training.rollout import encode
from unmask.training.run import Run
from unmask.training.run_config import several
from unmask.training.supervised_config import DistillTrainerConfig, SetTrainerConfig, SupervisedConfig

OWN_EMBEDDING = 256
"""Vocabularies up to this size get an embedding of the policy's own, larger ones a projection of the model's."""

MEAN = "mean"
"""Of the weights, in the tensors of a checkpoint."""


class SupervisedTrainer(Run):
    """Trains a policy on a frozen language model. Every argument but ``config`` replaces what the config names."""

    LAYERS: ClassVar[str]
    """The policy's part whose matrices Muon trains."""

    def __init__(
        self, config: Any, model: Any = None, tokenizer: Any = None, task: Task | None = None, policy: Any = None
    ) -> None:
        given = {"model": model, "tokenizer": tokenizer, "task": task, "policy": policy}
        super().__init__(config, given, trackers=None)
        self.prompts = Prompts(config, task)
        if config.labels == "answer" and self.prompts.task is not None:
            self.prompts.task.check_gradable(train=True)
        first = self.prompts.take(0, 1)[0]
        self.load(first, self.prompts.instructions)
        self.policy = self.make_policy(**self.of_model())
        self.settle_policy()
        self.collectors = []
        """One for each model."""
        shortest = SamplerConfig(max_new_tokens=min(several(config.max_completion_length)))
        for number, (model, tokenizer) in enumerate(zip(self.models, self.tokenizers, strict=True)):
            self.collectors.append(self.collector(model, tokenizer, number))
            self.check_holes(self.collectors[-1].careful, self.prompts.known(config.num_prompts), shortest)
        matrices, rest = matrices_and_rest(getattr(self.policy, self.LAYERS), self.policy)
        self.optimizers = (
            torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
            Muon(matrices, lr=config.muon_learning_rate, weight_decay=0.01),
        )
        self.rounds: list[Tried] = []
        """Of the latest rounds."""
        self.mean: dict[str, Tensor] = {}
        """Of the weights, as the finished policy has them."""

    def collector(self, model: Any, tokenizer: Any, number: int) -> Collector:
        """What labels the states of the model ``number``."""
        if self.config.labels != "answer":
            return Collector(model, tokenizer, self.policy, self.config, number)
        assert self.prompts.task is not None
        return AnswerCollector(model, tokenizer, self.policy, self.config, number, self.prompts.task)

    def of_model(self) -> dict[str, Any]:
        """Fields of a fresh policy's configuration that follow from the language model."""
        return {}

    def logits(self, inputs: Any, picked: Tensor) -> Tensor:
        """Differentiable logits (M, L) of the policy on ``inputs``, once ``picked`` (M, L) bool are committed."""
        raise NotImplementedError

    def calibrate(self, count: int) -> None:
        c, first = self.config, self.config.iterations * self.config.num_prompts
        ids = encode(self.tokenizer, self.prompts.take(first, count), c.max_prompt_length)
        curves = []
        for one in c.mixture:
            asked = {**one.decoded, "actions": "greedy"}
            for options in (Options(), Options(hold_eos=True)):
                policy = with_options(self.policy, options)
                sampler = Sampler(self.model, self.tokenizer, policy, SamplerConfig())
                source = f"{count} prompts of {self.prompts.source}"
                curves.append(measure_curve(sampler, ids, {**asked, "seed": 0}, source))
        self.policy.config = calibrated(self.policy.config, tuple(curves))

    def restore(self, state: dict[str, Any]) -> None:
        by_round: dict[int, dict[str, Tensor]] = {}
        tensors = {key: value.to(self.model.device) for key, value in state["tensors"].items()}
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            if number != MEAN:
                by_round.setdefault(int(number), {})[name] = value
        self.mean = {key.removeprefix(f"{MEAN}."): value for key, value in tensors.items() if key.startswith(MEAN)}
        self.rounds = [Tried.of(by_round[number], self.collectors[0].kind) for number in sorted(by_round)]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        each = enumerate(self.rounds)
        rounds = {f"{i}.{name}": value for i, part in each for name, value in part.tensors().items()}
        return {}, rounds | {f"{MEAN}.{name}": value for name, value in self.mean.items()}

    def step(self) -> dict[str, float]:
        """One round: decodes, labels, updates. Returns its metrics."""
        began = time.perf_counter()
        c = self.config
        problems = self.prompts.problems(self.iteration * c.num_prompts, c.num_prompts)
        collector = self.collectors[self.turn]
        ids = encode(self.tokenizers[self.turn], [problem.given for problem in problems], c.max_prompt_length)
        tried, metrics = collector.collect(ids, self.iteration, problems)
        if len(tried.turn):
            self.rounds = [*self.rounds, tried][-c.kept_iterations :]
        if not self.rounds and self.turn == len(self.models) - 1:
            unsolved, short = "no problem is solved by a careful decode", "every prompt is decoded in one forward"
            raise ValueError(f"there is nothing to learn: {unsolved if c.labels == 'answer' else short}")
        collected = time.perf_counter()
        metrics |= self.update() if self.rounds else {}
        metrics["seconds_rollouts"], metrics["seconds_update"] = collected - began, time.perf_counter() - collected
        self.iteration += 1
        self.average()
        return metrics

    @torch.no_grad()
    def average(self) -> None:
        """Take the weights after this round into their mean."""
        c = self.config
        count = self.iteration - round((1 - c.averaged) * c.iterations)
        if count < 1:
            return
        for name, p in self.policy.named_parameters():
            self.mean[name] = p.lerp(self.mean[name], 1 - 1 / count) if name in self.mean else p.clone()

    @torch.no_grad()
    def finish(self) -> None:
        for name, mean in self.mean.items():
            self.policy.get_parameter(name).copy_(mean)

    def update(self) -> dict[str, float]:
        """Several passes over rounds drawn from those kept; the mean loss, and that of the model's probabilities."""
        c, losses, priors = self.config, [], []
        rng = random.Random(f"update/{c.seed}/{self.iteration}")
        draws = torch.Generator().manual_seed(rng.getrandbits(62))
        for optimizer, rate in zip(self.optimizers, (c.learning_rate, c.muon_learning_rate), strict=True):
            optimizer.param_groups[0]["lr"] = rate * c.pace(self.iteration)
        for _ in range(c.num_iterations):
            for part in rng.sample(self.rounds, min(c.replayed_iterations, len(self.rounds))):
                count = len(part.turn)
                order = torch.randperm(count, generator=draws).to(part.turn.device)
                for index in order.chunk(-(-count // c.minibatch_size)):
                    loss, prior = self._fit(part, index)
                    losses.append(loss)
                    priors.append(prior)
        return {"loss": sum(losses) / len(losses), "model_loss": sum(priors) / len(priors)}

    def _fit(self, part: Tried, index: Tensor) -> tuple[float, float]:
        """One step of the optimizers on the states at ``index``; returns the loss and the model's own."""
        self.policy.attach(self.models[int(part.model[0])])
        alike = part.alike(index)
        loss = torch.cat([self.losses(p, self.logits) for p in alike]).mean()
        self.policy.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm, error_if_nonfinite=False)
        value = loss.item()
        if not value < float("inf"):
            raise FloatingPointError(f"the loss became {value}: training has diverged; begin anew with lower rates")
        for optimizer in self.optimizers:
            optimizer.step()
        return value, torch.cat([self.losses(p, lambda inputs, _: inputs.prior) for p in alike]).mean().item()

    def losses(self, tried: Tried, logits: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """(K,): binary cross entropy of each label, by ``logits`` as of :meth:`logits`."""
        if self.config.labels == "answer":
            return answer_loss(log_harmless(logits, tried), tried.survived.any(dim=1))
        given = logits(tried.inputs, tried.picked)[tried.valid], tried.survived[tried.valid].float()
        return F.binary_cross_entropy_with_logits(*given, reduction="none")


class SetTrainer(SupervisedTrainer):
    """Trains a set policy on a frozen language model.

    Example::

        policy = SetTrainer(SetTrainerConfig.from_yaml("quickstart")).train()
    """

    CONFIG, POLICY, LAYERS = SetTrainerConfig, SetPolicy, "layers"

    def of_model(self) -> dict[str, Any]:
        vocab, table = self.model.vocab_size, getattr(self.model, "embedding", None)
        width = None if table is None or vocab <= OWN_EMBEDDING else table.shape[1]
        return {"vocab_size": vocab, "embedding_size": width}

    def logits(self, inputs: Any, picked: Tensor) -> Tensor:
        logits: Tensor = self.policy(inputs, picked)
        return logits


class DistillTrainer(SupervisedTrainer):
    """Trains a policy of single positions on a frozen language model; its logits become those of the labels.

    Example::

        policy = DistillTrainer(DistillTrainerConfig.from_yaml("quickstart")).train()
    """

    CONFIG, POLICY, LAYERS = DistillTrainerConfig, Policy, "transformer_blocks"

    def logits(self, inputs: Any, picked: Tensor) -> Tensor:
        i = inputs
        logits: Tensor = self.policy(i.mask, i.confidence, i.time, None, i.allowed, int(i.blocks[0]), i.phase)
        return logits


class Prompts:
    """The endless stream of a run's prompts: a task's training problems, or the lines of a file in shuffled epochs."""

    def __init__(self, config: SupervisedConfig, task: Task | None) -> None:
        """Raises FileNotFoundError or ValueError for a file without prompts, and the errors of the task."""
        self.seed, self.texts = config.seed, [] if config.prompts is None else read_prompts(Path(config.prompts))
        self.task: Task | None = None
        if config.prompts is None or task is not None:
            self.task = task if task is not None else make_task(config.task, **config.task_options)
        self.source = Path(str(config.prompts)).name if self.task is None else self.task.name
        self.instructions = True if self.task is None else self.task.instructions
        self.take(0, 1)

    def problems(self, first: int, count: int) -> list[Problem]:
        """``count`` problems from number ``first`` on; prompts of a file have no answers."""
        if self.task is not None:
            return self.task.training_problems(self.seed, first, count)
        return [Problem(self._of_file(number), "") for number in range(first, first + count)]

    def take(self, first: int, count: int) -> list[str | Holes]:
        """Their prompts."""
        return [problem.given for problem in self.problems(first, count)]

    def known(self, count: int) -> list[str | Holes]:
        """The prompts of a finite task, else the first ``count``."""
        if not isinstance(self.task, ProblemSet):
            return self.take(0, count)
        return [problem.given for problem in self.task.all_problems(train=True)]

    def _of_file(self, number: int) -> str:
        epoch, place = divmod(number, len(self.texts))
        order = list(range(len(self.texts)))
        random.Random(f"prompts/{self.seed}/{epoch}").shuffle(order)
        return self.texts[order[place]]


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: one per line, or in a .jsonl file the "prompt" of the object in each line."""
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"prompts: {path} has none")
    if path.suffix != ".jsonl":
        return lines
    rows = [parse_json(line, f"prompts: {path}") for line in lines]
    try:
        return [checked("prompt", row["prompt"], Text) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'prompts: {path} needs one JSON object with a "prompt" per line: {error!r}') from None

"""What all training runs do: rounds, a log, checkpoints, and the policy with a record of how it was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unmask.files import locked
from unmask.models.loading import load_model
from unmask.sampling.config import SamplerConfig
from unmask.sampling.infill import given_problems
from unmask.sampling.prompts import ChatTokenizer
from unmask.sampling.sampler import Sampler
from unmask.tasks.base import Holes, Task
from unmask.training import checkpoint
from unmask.training.interrupt import StopSignals, leave
from unmask.training.metrics import METRICS, Averages, MetricsLog
from unmask.training.processes import Processes
from unmask.training.progress import Progress
from unmask.training.record import (
    place_of,
    run_part,
    settings_used,
    training_record,
    with_part,
    write_config,
    write_training,
)
from unmask.training.rollout import tokenizer_for
from unmask.training.run_config import RunConfig

OnLog = Callable[[int, dict[str, float]], None]
"""Called with the iteration and what was logged, training and evaluation lines alike."""


class Run:
    """A training run of a policy on a frozen language model."""

    CONFIG: ClassVar[type[RunConfig]]
    POLICY: ClassVar[type[Any]]

    optimizers: Sequence[torch.optim.Optimizer]
    policy: Any
    models: list[Any]
    tokenizers: list[Any]
    """One for each model."""

    def __init__(self, config: Any, given: Mapping[str, Any], trackers: Sequence[str] | None) -> None:
        """``given`` are the arguments that replace what the config names, by name; None: not given.
        ``trackers`` are those of :class:`Processes`.

        Raises TypeError for an argument of a wrong type, and the errors of :func:`checkpoint.check`.
        """
        kinds: dict[str, Any] = {"config": self.CONFIG, "task": Task, "policy": self.POLICY}
        for name, value in {"config": config, **given}.items():
            if name in kinds and not isinstance(value, kinds[name]) and (value is not None or name == "config"):
                raise TypeError(f"{name} must be a {kinds[name].__name__}, got {value!r}")
        self.config, self.output = config, Path(config.output_dir)
        self.processes = Processes(trackers, self.output)
        self.replaced = {name: value for name, value in given.items() if value is not None}
        self.parts: list[dict[str, Any]] = []
        """The stretches of the run, of which there are several if it was stopped and resumed."""
        self.iteration = 0
        self.given = {name: place_of(value) for name, value in self.replaced.items()}
        checkpoint.check(self.output, config, self.given)

    def load(self, first: str | Holes, instructions: bool, **how: Any) -> None:
        """Load models and tokenizers unless they were given; ``first`` is the first prompt."""
        c, given = self.config, self.replaced
        models, known = (plain_list(given.get(name)) for name in ("model", "tokenizer"))
        c.check_models(len(models or c.models))
        count = len(models or c.models)
        if len(known) not in (0, 1, count):
            raise ValueError(f"tokenizer: {len(known)} were given for {count} models; give one for all or one for each")
        self.models = models or [load_model(name, self.processes.device, c.dtype, **how) for name in c.models]
        for model in self.models:
            model.requires_grad_(False).eval()
        names = c.models if len(c.models) == count else c.models[:1] * count
        each = zip(known * (count if len(known) == 1 else 1) or [None] * count, names, strict=True)
        self.tokenizers = [tokenizer_for(replace(c, model=name), one, instructions, first) for one, name in each]

    @property
    def model(self) -> Any:
        """The first model."""
        return self.models[0]

    @property
    def tokenizer(self) -> Any:
        """That of the first model."""
        return self.tokenizers[0]

    @property
    def turn(self) -> int:
        """The number of the model whose turn it is."""
        return self.iteration % len(self.models)

    def make_policy(self, **of_model: Any) -> Any:
        """The policy that was given, that the config begins with, or a fresh one."""
        c = self.config
        if "policy" in self.replaced:
            return self.replaced["policy"]
        if c.init_policy is not None:
            return self.POLICY.from_pretrained(c.init_policy)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            return self.POLICY(c.policy_config(**of_model))

    def settle_policy(self) -> None:
        """Put the policy beside the model, and note in it how it is trained, which a Sampler then decodes with."""
        self.policy.to(self.model.device).train()
        self.policy.source = ""
        self.policy.config = self.policy.config.updated(self.config.noted)

    def check_holes(self, sampler: Sampler, given: Sequence[Any], config: SamplerConfig) -> None:
        """Find bad ids of texts with holes before any work."""
        if isinstance(given[0], Holes):
            given_problems(sampler, given, config)

    def step(self) -> dict[str, float]:
        """One round: decodes, labels or rewards, updates. Returns its metrics."""
        raise NotImplementedError

    def finish(self) -> None:
        """Give the policy the weights that it keeps."""

    def calibrate(self, count: int) -> None:
        """Note the policy's forwards at each value of its dial, on ``count`` further prompts."""
        raise NotImplementedError

    def log_evaluation(self, write: Callable[[dict[str, float]], None]) -> None:
        """``write`` an evaluation, if one is due."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """What else a checkpoint holds, in JSON's types and as tensors."""
        return {}, None

    def restore(self, state: dict[str, Any]) -> None:
        """The reverse of :meth:`state`; the tensors are under "tensors"."""

    def train(self, on_log: OnLog | None = None, progress: bool = True) -> Any:
        """Train to ``config.iterations``, from a checkpoint if the config asks for it, and return the policy.

        ``progress`` shows what is logged on standard error: in a terminal in one line, elsewhere line by line.
        Writes config.yaml, metrics.jsonl, checkpoints/, policy/, and best/ (by evaluation reward) if there are
        evaluations. SIGINT (Ctrl-C) and SIGTERM end the run after the round, with a checkpoint.

        Raises FileExistsError if the folder holds another run, BlockingIOError if one is writing there, ValueError if
        its settings differ, FloatingPointError if training diverged (checkpoints are from before), KeyboardInterrupt or
        SystemExit after a signal.
        """
        main = self.processes.is_main
        with locked(self.output / METRICS, wait=False) if main else nullcontext(), StopSignals() as signals:
            with closing(Progress(self.config.iterations, progress and main)) as shown:
                stopped_by = self._train(signals, shown, on_log)
            self.processes.finish()
        if stopped_by:
            leave(stopped_by)
        return self.policy.eval()

    def _train(self, signals: StopSignals, progress: Progress, on_log: OnLog | None) -> int:
        """Train to the end or to a signal; returns the signal's number, 0 for none."""
        c, main, log = self.config, self.processes.is_main, None
        self._resume()
        if main:
            write_config(self.output, c, self.replaced)
            log = MetricsLog(self.output / METRICS, self.iteration)
        self.processes.start_trackers(settings_used(c, self.replaced))

        def write(values: dict[str, float]) -> None:
            if log is not None:
                log.write(self.iteration, values)
            self.processes.log(values, self.iteration)
            progress(self.iteration, values)
            if on_log is not None and main:
                on_log(self.iteration, values)

        averages, stopped_by = Averages(), 0
        if self.iteration == 0:
            self.log_evaluation(write)
        while self.iteration < c.iterations and not stopped_by:
            averages.add(self.step())
            stopped_by = int(self.processes.maximum(signals.received))
            ends = bool(stopped_by) or self.iteration == c.iterations
            if self.iteration % c.logging_steps == 0 or ends:
                write(averages.take())
            else:
                progress.passed(self.iteration)
            self.log_evaluation(write)
            if self.iteration % c.save_steps == 0 or ends:
                self._save()
        if self.iteration < c.iterations:
            return stopped_by
        self.finish()
        self.save_policy(self.output / "policy")
        if c.calibration_prompts and main:
            self.calibrate(c.calibration_prompts)
            self.save_policy(self.output / "policy")
        return 0

    def _resume(self) -> None:
        """Go on from the checkpoint that the config asks for, if there is one."""
        state = checkpoint.resume(self.output, self.policy, self.optimizers, self.config)
        if state is None:
            self.parts = [run_part(0, self.processes.count)]
            return
        self.iteration = state["iteration"]
        self.parts = with_part(state.get("parts", [{"from": 0}]), run_part(self.iteration, self.processes.count))
        self.restore(state)

    def _save(self) -> None:
        if self.processes.is_main:
            state, tensors = self.state()
            content = {"parts": self.parts, "given": self.given, **state}
            checkpoint.save(self.output, self.iteration, self.policy, self.optimizers, self.config, content, tensors)
        self.processes.wait()

    def save_policy(self, folder: Path) -> None:
        """Write the policy with a record of its training."""
        if self.processes.is_main:
            self.policy.save_pretrained(folder)
            known = {"dtype": str(self.model.dtype)[6:], "chat_template": isinstance(self.tokenizer, ChatTokenizer)}
            record = training_record(self.config, self.iteration, self.parts, self.replaced, **known)
            write_training(folder, record)


def plain_list(value: Any) -> list[Any]:
    """What was given as an argument, one or several, as a list; empty for None."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

"""Canvases of random tokens (DiffusionGemma): transformers generates, and a policy says what each step accepts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from threading import Semaphore
from typing import Any

import torch
from torch import Tensor

from unmask import ops
from unmask.policies.base import Observation, UnmaskingPolicy
from unmask.policies.heuristics import FixedSteps
from unmask.policies.schedules import BlockSteps
from unmask.sampling.config import SamplerConfig
from unmask.sampling.loop import StepRecord
from unmask.sampling.state import COMPLETE, RUNNING, State
from unmask.sampling.step import commit, observation

UNUSED = (
    *("sub_block_length", "temperature", "top_k", "top_p", "repetition_penalty", "cfg_scale", "max_steps", "stop"),
    *("cache_refresh", "record", "deterministic"),
)
"""Settings without a meaning here: they must be what they are by default."""


def check_canvases(model: Any, policy: UnmaskingPolicy, config: SamplerConfig) -> None:
    """Raise ValueError for settings and policies that canvases of random tokens cannot have."""
    name, plain = type(model).__name__, SamplerConfig()
    hint = "steps and temperatures are those of the model's generation_config"
    for setting in UNUSED:
        if (value := getattr(config, setting)) != getattr(plain, setting):
            raise ValueError(f"{setting}={value} does not apply to {name}, which fills no masks; {hint}")
    if config.cache not in ("auto", "exact"):
        raise ValueError(f'cache="{config.cache}" does not apply to {name}, which always caches what is finished')
    if config.block_length != model.canvas_length:
        raise ValueError(
            f"block_length must be {name}'s canvas_length={model.canvas_length}, got {config.block_length}"
        )
    if isinstance(policy.bare, (FixedSteps, BlockSteps)) or policy.edits:
        raise ValueError(f"policy {policy.spec} counts or edits filled masks, but {name} has none; use another policy")


def canvas_steps(model: Any, policy: UnmaskingPolicy, whole: State, config: SamplerConfig) -> Iterator[StepRecord]:
    """Decode all rows of ``whole``, at most ``max_batch_size`` at once, yielding a record of every step.

    The draws are transformers', from torch's generator seeded with ``seed`` plus the number of the first row that is
    decoded at once. torch's generator stays as the caller has it.
    """
    count = len(whole.rows)
    everything = torch.arange(count, device=whole.tokens.device)
    for rows in everything.split(config.max_batch_size or count) if count else ():
        work = Canvases(model, policy, whole.take(rows), rows, config)
        seed = ((config.seed or 0) + int(work.state.sequence[0])) % 2**63
        yield from with_seed(in_turns(work.generate), seed, torch.device(model.device))
        whole.put(rows, work.state)


class Canvases:
    """Rows that transformers generates together. ``state`` holds what is known of their completions.

    A mask of ``state`` is a position of an unfinished canvas; it has the most probable token of the latest step.
    """

    def __init__(self, model: Any, policy: UnmaskingPolicy, state: State, rows: Tensor, config: SamplerConfig) -> None:
        self.model, self.policy, self.state, self.rows, self.config = model, policy, state, rows, config
        self.canvas, self.first = state, -1
        """What the policy decides on: the active canvas as a buffer of its own, from ``first`` on (-1: none yet)."""

    def generate(self, emit: Callable[[StepRecord], None]) -> None:
        """Generate to the end; every step is given to ``emit``."""
        start, attention = self.state.start, self.state.attention
        self.model.generate(
            self.state.tokens[:, :start].clone(),
            None if attention is None else attention[:, :start],
            functools.partial(self.step, emit),
            self.state.length,
            self.state.stop_ids,
        )

    def step(self, emit: Callable[[StepRecord], None], denoise: Callable[..., Any], **arguments: Any) -> Any:
        """One step of transformers, ``denoise``, in which the policy says what its sampler accepts."""
        state, sampler, first = self.state, arguments["sampler"], arguments["input_ids"].shape[1] - self.state.start
        if first != self.first:
            self.open(first)
        done = state.done | arguments["finished_denoising"]
        before, left = state.steps.clone(), int(self.rows[0]) + int(state.done.sum())
        decided: list[tuple[Observation, Tensor]] = []

        def accept(canvas: Tensor, sampled: Tensor, logits: Tensor, *_: Any) -> Tensor:
            decided.append(self.decide(canvas, sampled, logits, done))
            sampler.accepted_token_mask = decided[-1][1] >= 0
            return torch.where(sampler.accepted_token_mask, sampled, canvas)

        sampler.accept_canvas = accept
        result = denoise(**arguments)
        result[3].logical_or_(state.done)  # else the canvas goes on until rows that have stopped are confident, too
        self.write(first, result[1], ~done, result[3] | (arguments["cur_step"] == 1))
        seen, rank = decided[-1]
        ranks = rank.new_full(state.mask.shape, -1)
        ranks[:, first : first + rank.shape[1]] = rank
        emit(StepRecord(self.rows, state, replace(seen, steps=before, now=None), ranks, left))
        return result

    def open(self, first: int) -> None:
        """Begin the canvas at ``first``: the policy's steps and memory start anew."""
        state = self.state
        tokens = state.tokens.new_full((len(self.rows), self.model.canvas_length), self.model.mask_token_id)
        self.canvas, self.first = State.create(tokens, 0, self.model.mask_token_id, self.model.canvas_length), first
        self.canvas.sequence.copy_(state.sequence)
        self.canvas.draw_step.copy_(state.steps)
        self.canvas.position.fill_(first)
        self.canvas.alpha, self.canvas.condition, self.canvas.seed = state.alpha, state.condition, state.seed
        self.canvas.shift = state.shift
        self.canvas.horizon, self.canvas.max_steps, self.canvas.end_ids = state.horizon, 2**31 - 1, state.end_ids

    def decide(self, tokens: Tensor, sampled: Tensor, logits: Tensor, done: Tensor) -> tuple[Observation, Tensor]:
        """What the policy sees and the rank (N, C) of what it accepts; every position is open to it in every step."""
        canvas, needs = self.canvas, self.policy.needs
        canvas.tokens.copy_(tokens)
        canvas.mask.fill_(True)
        canvas.allowed.copy_(~done[:, None])
        canvas.remaining.fill_(canvas.length)
        canvas.block.zero_()
        canvas.status.copy_(torch.where(done, COMPLETE, RUNNING))
        stats = ops.topk_confidence(logits, self.policy.num_confidences, logsumexp=True, entropy="entropy" in needs)
        assert stats.logsumexp is not None
        chosen = logits.gather(2, sampled[..., None]).squeeze(2).float()
        values = {"confidence": stats.confidence, "candidates": sampled}
        values["token_confidence"] = (chosen - stats.logsumexp).exp()
        values |= {} if stats.entropy is None else {"entropy": stats.entropy}
        values |= {"logits": logits} if "logits" in needs else {}
        self.policy.bare.attach(self.model)
        seen = observation(values, canvas, self.policy, self.config)
        return seen, commit(canvas, seen, self.policy.decide(seen), self.config)

    def write(self, first: int, canvas: Tensor, live: Tensor, final: Tensor) -> None:
        """Put ``canvas`` (N, C) into rows ``live`` (N,); those that are also ``final`` end the canvas, or the row."""
        state, ended = self.state, (live & final)[:, None]
        text, mask = state.buffer[:, first:], state.mask[:, first:]  # from the canvas on
        inside = torch.arange(text.shape[1], device=text.device) < canvas.shape[1]
        text[:, : canvas.shape[1]] = torch.where(live[:, None], canvas, text[:, : canvas.shape[1]])
        stops = torch.isin(text, text.new_tensor(state.stop_ids)).long()
        behind = ended & (stops.cumsum(dim=1) > stops)
        text.masked_fill_(behind, self.model.pad_token_id)
        mask &= ~(behind | (ended & inside))
        state.steps.add_(live)
        state.forwards.add_(live)
        state.remaining.copy_(state.mask.sum(dim=1))
        state.status.masked_fill_(state.remaining == 0, COMPLETE)


def in_turns(run: Callable[[Callable[[StepRecord], None]], None]) -> Iterator[StepRecord]:
    """What ``run`` gives to its callback, one by one.

    ``run`` works in a thread, which rests while a record is looked at. Its errors are raised here, and closing the
    iterator ends it.
    """
    records: SimpleQueue[StepRecord | None] = SimpleQueue()
    turn, closed, inference = Semaphore(0), False, torch.is_inference_mode_enabled()

    def emit(record: StepRecord) -> None:
        records.put(record)
        turn.acquire()
        if closed:
            raise GeneratorExit

    def work() -> None:
        with torch.inference_mode(inference):
            run(emit)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        future.add_done_callback(lambda _: records.put(None))
        try:
            while (record := records.get()) is not None:
                yield record
                turn.release()
            future.result()
        finally:
            closed = True
            turn.release()


def with_seed(records: Iterator[StepRecord], seed: int, device: torch.device) -> Iterator[StepRecord]:
    """``records``, computed with torch's generators seeded once; between them the caller's state is in place."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index])

    def exchange(states: list[Tensor]) -> list[Tensor]:
        before = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        return before

    states = [torch.Generator(generator.device).manual_seed(seed).get_state() for generator in generators]
    while True:
        states = exchange(states)
        try:
            record = next(records, None)
        finally:
            states = exchange(states)
        if record is None:
            return
        yield record

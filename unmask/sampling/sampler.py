"""The Sampler: prompts in, completions out, by one loop over one denoising step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from unmask.models.loading import load_model, load_tokenizer
from unmask.models.placement import DeviceMap
from unmask.policies.base import Observation, UnmaskingPolicy
from unmask.policies.config import PolicyConfig
from unmask.policies.registry import make_policy
from unmask.sampling.batch import Batch, EagerBatch, GraphedBatch, why_no_graphs
from unmask.sampling.canvas import POISONED, Canvas
from unmask.sampling.capture import CudaGraphs
from unmask.sampling.clock import PhaseClock
from unmask.sampling.config import SamplerConfig
from unmask.sampling.graph import Owner, StepGraphs
from unmask.sampling.infill import infill, infill_config
from unmask.sampling.prompts import Prompts, Tokenizer, check_ids, encode_prompts, with_chat_template
from unmask.sampling.result import GenerationResult, StreamEvent, first_eos
from unmask.sampling.sharing import SeenCanvases, first_of_groups
from unmask.sampling.step import DenoisingStep
from unmask.sampling.stopping import DoneFlags, rows_until_change, worth_shrinking
from unmask.sampling.streaming import PrefixStream, Streamer
from unmask.sampling.trajectory import Recorder

DEFAULT_POLICY = "threshold:0.9"
"""For models that come without a policy of their own."""

SEEN_PER_ROW = 8
"""Canvases remembered per working row, where rollouts share forwards: they meet within a few steps or never."""

OnStep = Callable[[Tensor, Canvas, Tensor, Observation, Tensor], None]
"""Called after each step: working rows (R,), their canvas, which took no step, what was seen, the ranks."""

OnFinished = Callable[[int], None]
"""Called as rows leave the batch: how many are finished by now."""


class Sampler:
    """Decodes a masked diffusion language model with an unmasking policy.

    ``model`` follows the interface of :class:`unmask.models.base.ModelBase` (see :func:`unmask.load_model`);
    ``policy`` is a name such as "threshold:0.9", a folder or hub id of a learned policy, or an object with the policy
    interface; None: the one that comes with the model, else "threshold:0.9". Without a ``config`` the buffer is the
    model's, the blocks are those that the policy, else the model, was trained for, and a learned policy's actions are
    drawn as in its training.

    Example::

        sampler = Sampler.from_pretrained("tiny")
        print(sampler.generate("cEaCfBeG:a=").texts)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        policy: str | UnmaskingPolicy | None = None,
        config: SamplerConfig | None = None,
    ) -> None:
        check_model(model)
        self.model, self.tokenizer = model, tokenizer
        # A packaged model brings the buffer and block length it was trained for, and a policy trained on it.
        defaults = dict(getattr(model, "generation_defaults", {}))
        own = defaults.pop("policy", DEFAULT_POLICY)
        policy = own if policy is None else policy
        self.policy = policy if not isinstance(policy, str) else make_policy(policy)
        if not callable(getattr(self.policy, "decide", None)):
            raise TypeError(f"policy must be a name or an object with the policy interface, got {self.policy!r}")
        if config is not None and not isinstance(config, SamplerConfig):
            raise TypeError(f"config must be a SamplerConfig, got {type(config).__name__}")
        learned = getattr(self.policy, "config", None)
        if isinstance(learned, PolicyConfig):
            defaults |= learned.decoding()
        self.config = config or SamplerConfig(**defaults)
        self.clock: PhaseClock | None = None
        """Set to one to learn how long the model and the policy take in each generation."""
        self.graphs: StepGraphs | None = None
        """Captured steps, kept from one generation to the next; made when the first one wants them."""
        if isinstance(self.policy, torch.nn.Module):
            self.policy.to(model.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without captured steps, which stay with this object."""
        return {**self.__dict__, "graphs": None}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        policy: str | UnmaskingPolicy | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        config: SamplerConfig | None = None,
        trust_remote_code: bool = False,
        device_map: DeviceMap | None = None,
        chat_template: bool | None = False,
        system_prompt: str | None = None,
    ) -> Sampler:
        """Load model and tokenizer by packaged name, local folder or hub id; see :func:`unmask.load_model`.

        With ``chat_template`` text prompts are the user's messages, in the tokenizer's chat template and behind the
        ``system_prompt``; None: if it has one. False leaves texts as they are.
        """
        tokenizer = with_chat_template(load_tokenizer(name), chat_template, system_prompt)
        model = load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code, device_map=device_map)
        return cls(model, tokenizer, policy, config)

    def generate(
        self,
        prompts: Prompts,
        attention_mask: Tensor | None = None,
        streamer: Streamer | None = None,
        **overrides: Any,
    ) -> GenerationResult:
        """Complete each prompt with ``max_new_tokens`` tokens.

        ``prompts``: a string, a list of strings or of id lists, or int64 (B, P), then with ``attention_mask`` (B, P)
        if left-padded. ``streamer``: one of transformers', for a single prompt; it gets the prompt and then the
        completion from left to right as it becomes final, and its ``end`` is called even if the generation fails.
        ``overrides`` replace fields of the Sampler's config for this call.
        Raises TypeError or ValueError before any work for bad input, FloatingPointError if the model's logits were
        undefined (NaN, +inf) where a token had to be committed.
        """
        try:
            config, eos = self.config.updated(overrides), self.model.eos_token_id
            canvas = self.prepare(prompts, attention_mask, config)
            if streamer is None:
                return self.finish(canvas, config, eos)
            stream = PrefixStream(streamer, canvas, eos)
            result = self.finish(canvas, config, eos, watch=stream.on_step)
            stream.finish(canvas)
            return result
        finally:
            if streamer is not None:  # or a reader in another thread would wait for ever
                streamer.end()

    def infill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **overrides: Any) -> GenerationResult:
        """Fill the mask tokens of int64 ``input_ids`` (B, T), wherever they are, and touch nothing else.

        Blocks count from a row's first token, and the last may be shorter; blocks without masks are skipped; end of
        sequence does not stop a row.
        """
        config = infill_config(self.config, overrides)
        self.check_config(config)
        return infill(self, input_ids, attention_mask, config)

    def stream(self, prompts: Prompts, attention_mask: Tensor | None = None, **overrides: Any) -> Iterator[StreamEvent]:
        """Decode as :meth:`generate` does, yielding after each step what it committed.

        Bad input is refused at once, not when the first event is asked for.
        """
        config = self.config.updated(overrides)
        return self.events(self.prepare(prompts, attention_mask, config), config)

    def prepare(self, prompts: Prompts, attention_mask: Tensor | None, config: SamplerConfig) -> Canvas:
        """Validated prompts with a buffer of masks behind them."""
        self.check_config(config)
        model = self.model
        ids, attention = encode_prompts(prompts, attention_mask, self.tokenizer, self.padding_id)
        check_ids("prompts", ids, attention, model.vocab_size, model.mask_token_id)
        length = config.max_new_tokens
        self.check_context(ids.shape[1] + length, f"prompt of {ids.shape[1]} tokens + max_new_tokens={length}")
        tokens = torch.cat((ids, ids.new_full((ids.shape[0], length), model.mask_token_id)), dim=1)
        if attention is not None:
            attention = torch.cat((attention, attention.new_ones((ids.shape[0], length))), dim=1)
            attention = attention.to(model.device)
        block_length = config.block_length or length
        canvas = Canvas.create(tokens.to(model.device), attention, ids.shape[1], model.mask_token_id, block_length)
        return self.with_alpha(canvas, config)

    def with_alpha(self, canvas: Canvas, config: SamplerConfig) -> Canvas:
        """``canvas`` with the config's alpha, else the policy's own, in every row, if the policy is conditioned."""
        if getattr(self.policy, "alpha_conditioned", False):
            own = self.policy.config.default_alpha  # type: ignore[union-attr]
            alpha = own if config.alpha is None else config.alpha
            self.set_alpha(canvas, torch.full(canvas.steps.shape, float(alpha), device=canvas.steps.device))
        elif config.alpha is not None:
            raise ValueError(f"alpha={config.alpha} was given, but the policy is not conditioned on alpha")
        return canvas

    def set_alpha(self, canvas: Canvas, alpha: Tensor) -> None:
        """Ask the policy, which is conditioned on it, for the trade-off ``alpha`` (N,) float32 of each row."""
        prepare = getattr(self.policy, "dial", None)  # a policy may do all with alpha in each step
        canvas.alpha, canvas.dial = alpha, None if prepare is None else prepare(alpha)

    @property
    def padding_id(self) -> int:
        """What stands under left padding: the model's own, else its end of sequence; never the mask token."""
        own = (getattr(self.model, "pad_token_id", None), self.model.eos_token_id, 0)
        return next(i for i in own if i is not None and i != self.model.mask_token_id)

    def check_context(self, length: int, what: str) -> None:
        limit = getattr(self.model, "max_length", None)
        if limit is not None and length > limit:
            raise ValueError(f"{what} exceeds the model's context of {limit} tokens")

    def check_config(self, config: SamplerConfig) -> None:
        """Refuse what this model and policy cannot do."""
        if config.cache != "none" and not getattr(self.model, "supports_cache", False):
            split = " computed on several devices" if getattr(self.model, "input_device", None) is not None else ""
            raise ValueError(
                f'cache="{config.cache}" needs a model that keeps keys and values, which {type(self.model).__name__}'
                f'{split} does not; use cache="none"'
            )
        if config.cuda_graphs and (reason := self.why_no_graphs(config)):
            raise ValueError(
                f"cuda_graphs=True is not possible, as {reason}; leave it None to have them where they are"
            )

    def why_no_graphs(self, config: SamplerConfig) -> str | None:
        """Why steps cannot be captured and replayed, None if they can be; see :mod:`unmask.sampling.graph`."""
        device = torch.device(self.model.device)
        if self.graphs is None and device.type != "cuda":
            return f"the model is on {device}"
        return why_no_graphs(self.model, self.policy, config, self.clock is not None, device)

    @torch.no_grad()
    def run(
        self,
        canvas: Canvas,
        config: SamplerConfig,
        on_step: OnStep | None = None,
        group_size: int = 1,
        on_finished: OnFinished | None = None,
    ) -> Iterator[None]:
        """The generation loop: advances all rows of ``canvas`` to their end, yielding after each step.

        With captured steps and no ``on_step`` the device may take many steps between two yields. Works on up to
        ``max_batch_size`` rows at a time; a finished row makes room for the next prompt, or the batch shrinks. The
        rows' results are written back to ``canvas`` as they finish. Of ``group_size`` consecutive rows with equal
        tokens (the rollouts of a prompt) the model sees one in their first step, where it can be shared; on the CPU,
        where comparing rows waits for nothing, it sees one of all equal rows, and none that equals a row of recent
        steps.
        """
        eos = self.model.eos_token_id if config.stop_at_eos else None
        step = DenoisingStep(self.model, self.policy, config, eos, self.clock)
        group = group_size if step.can_share() else 1
        queue = [i for i, done in enumerate(canvas.done.tolist()) if not done]
        width = min(config.max_batch_size or len(queue), len(queue))
        width = max(width - width % group, min(group, len(queue)))
        rows = torch.tensor(queue[:width], dtype=torch.int64, device=canvas.tokens.device)
        del queue[:width]
        flags = DoneFlags(canvas.done.device)
        on_cpu = rows.device.type == "cpu"
        if on_cpu and group > 1 and width:
            step.seen = SeenCanvases(SEEN_PER_ROW * width)
        distinct = first_of_groups(0, width, group, rows.device)
        with closing(self.make_batch(step)) as batch:
            batch.load(canvas.take(rows))
            while len(rows):
                work = batch.canvas
                enough = rows_until_change(len(rows), width - group if queue else 0)
                if on_step is None and distinct is None and batch.advance_until(enough):
                    flags.reset()
                    yield
                    finished: list[bool] | None = work.done.tolist()
                else:
                    before = work.steps.clone() if on_step else work.steps
                    observation, rank = batch.advance(distinct)
                    distinct = None
                    if on_step:
                        on_step(rows, work, work.steps == before, observation, rank)
                    yield
                    finished = flags.poll(work.done)
                if finished is None or not any(finished):
                    continue
                room = (width - finished.count(False)) // group * group
                if (queue and room) or worth_shrinking(sum(finished), len(finished), on_cpu):
                    canvas.put(rows, work)
                    keep = torch.tensor([i for i, done in enumerate(finished) if not done], dtype=torch.int64)
                    fresh, queue = queue[:room], queue[room:]
                    keep = keep.to(rows.device)
                    rows = torch.cat((rows[keep], rows.new_tensor(fresh)))
                    batch.rearrange(canvas.take(rows), keep, len(fresh))
                    distinct = first_of_groups(len(keep), len(fresh), group, rows.device)
                    flags.reset()
                    if on_finished:
                        on_finished(canvas.steps.shape[0] - len(rows) - len(queue))

    def make_batch(self, step: DenoisingStep) -> Batch:
        """Rows to be advanced by ``step``, or by captured ones like it where that is possible and nobody else does so.

        Close it.
        """
        config = step.config
        if config.cuda_graphs is False or self.why_no_graphs(config) is not None:
            return EagerBatch(step)
        device = torch.device(self.model.device)
        if self.graphs is None or self.graphs.backend.device != device:
            total = torch.cuda.get_device_properties(device).total_memory
            self.graphs = StepGraphs(CudaGraphs(device), max_bytes=total // 4)
        owner = Owner.of(self.model, self.policy, config, step.eos)
        if not self.graphs.acquire():
            return EagerBatch(step)
        return GraphedBatch(self.graphs, owner, config, step.eos, self.padding_id)

    def finish(
        self,
        canvas: Canvas,
        config: SamplerConfig,
        eos_token_id: int | None,
        group_size: int = 1,
        watch: OnStep | None = None,
        on_finished: OnFinished | None = None,
    ) -> GenerationResult:
        """Run the loop (see :meth:`run`) and gather its result; ``watch`` is called after each step."""
        holes = canvas.remaining.clone()
        recorder = Recorder() if config.record else None

        def on_step(rows: Tensor, work: Canvas, idle: Tensor, seen: Observation, rank: Tensor) -> None:
            if recorder is not None:
                recorder.append(rows, idle, seen, rank)
            if watch is not None:
                watch(rows, work, idle, seen, rank)

        for _ in self.run(canvas, config, on_step if recorder or watch else None, group_size, on_finished):
            pass
        raise_if_poisoned(canvas)
        if eos_token_id is None:
            filled = holes - canvas.remaining
        else:
            written = (first_eos(canvas.buffer, eos_token_id) + 1).clamp_max(canvas.length)
            filled = torch.minimum(written, holes - canvas.remaining)
        return GenerationResult(
            sequences=canvas.tokens,
            completions=canvas.buffer,
            steps=canvas.steps,
            finished=canvas.remaining == 0,
            filled=filled,
            texts=self.decode(canvas.buffer, eos_token_id),
            trajectory=recorder.trajectory(canvas, self.policy.num_confidences) if recorder else None,
        )

    def decode(self, completions: Tensor, eos_token_id: int | None) -> list[str] | None:
        """Texts up to the first end of sequence; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        ends = first_eos(completions, eos_token_id).tolist()
        rows = completions.tolist()
        return [self.tokenizer.decode(row[:end], skip_special_tokens=True) for row, end in zip(rows, ends, strict=True)]

    def events(self, canvas: Canvas, config: SamplerConfig) -> Iterator[StreamEvent]:
        latest: list[StreamEvent] = []

        def on_step(rows: Tensor, work: Canvas, idle: Tensor, _: Observation, rank: Tensor) -> None:
            canvas.put(rows, work)
            took = (~idle).cpu()
            committed, buffer = (rank >= 0).cpu()[took], work.buffer.cpu()[took]
            positions = [row.nonzero().flatten().tolist() for row in committed]
            latest[:] = [
                StreamEvent(
                    rows=rows.cpu()[took].tolist(),
                    steps=work.steps.cpu()[took].tolist(),
                    positions=positions,
                    tokens=[row[p].tolist() for row, p in zip(buffer, positions, strict=True)],
                    finished=work.done.cpu()[took].tolist(),
                    completions=canvas.buffer.cpu().clone(),
                )
            ]

        for _ in self.run(canvas, config, on_step):
            if latest[0].rows:
                yield latest[0]
        raise_if_poisoned(canvas)


def check_model(model: Any) -> None:
    """Raise TypeError for what has not the interface of a model."""
    wanted = ("mask_token_id", "eos_token_id", "vocab_size", "device")
    missing = [name for name in wanted if not hasattr(model, name)]
    if getattr(model, "dtype", None) == torch.float64:
        raise TypeError("model computes in float64, but logits are read in float32, bfloat16 or float16")
    if missing:
        hint = "; Sampler.from_pretrained takes a name" if isinstance(model, str) else ""
        raise TypeError(
            f"model must be a model as load_model gives it, got {type(model).__name__}, which has no "
            f"{', '.join(missing)}{hint}"
        )


def raise_if_poisoned(canvas: Canvas) -> None:
    rows = (canvas.status == POISONED).nonzero().flatten().tolist()
    if rows:
        raise FloatingPointError(
            f"the model's logits were undefined (NaN or +inf) where a token had to be committed, in rows {rows}"
        )

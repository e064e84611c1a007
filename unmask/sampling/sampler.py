"""The Sampler: prompts in, completions out, by one loop over one denoising step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.config import UnknownName
from unmask.models.loading import load_model, load_tokenizer
from unmask.models.overrides import Overrides
from unmask.ops.unmask_ import REVISED
from unmask.policies.base import UnmaskingPolicy
from unmask.policies.registry import as_policy
from unmask.sampling.canvas import blocks_of, room_for
from unmask.sampling.checks import check_model, check_settings
from unmask.sampling.config import SamplerConfig
from unmask.sampling.dials import set_dials
from unmask.sampling.forward import Forward, SeenStates, can_share, model_attention
from unmask.sampling.graphs import CudaCapture, GraphRunner, StepGraphs, why_no_graphs
from unmask.sampling.infill import assemble, given_texts, split
from unmask.sampling.loop import Step, StepRecord, decode
from unmask.sampling.noise import canvas_steps
from unmask.sampling.prompts import (
    Prompts,
    Tokenizer,
    check_ids,
    encode_prompts,
    end_of_turn,
    with_chat_template,
)
from unmask.sampling.result import GenerationResult, StreamEvent, first_stop
from unmask.sampling.state import RUNNING, State
from unmask.sampling.stopping import StopStrings, StopWatch
from unmask.sampling.streaming import PrefixStream, Streamer
from unmask.sampling.trace import Origin
from unmask.sampling.trajectory import Recorder

DEFAULT_POLICY = "threshold:0.9"
"""The policy for models that come without one."""

DECODING = {f.name for f in fields(SamplerConfig)} - {f.name for f in fields(Overrides)}
"""Settings of decoding that are not also said at loading."""

SEEN_PER_ROW = 8
"""Canvases kept per row where rollouts share forwards; rollouts rarely meet after more than a few steps."""


class Sampler:
    """Decodes a masked diffusion language model with an unmasking policy.

    ``model`` follows the interface of :class:`unmask.models.base.ModelBase` (see :func:`unmask.load_model`);
    ``policy`` is a name such as "threshold:0.9", a folder or hub id of a learned policy, or an object with the policy
    interface; None: the one that comes with the model, else "threshold:0.9". Without a ``config`` the settings are
    the policy's (block length and actions of its training), else the model's, else the defaults.

    Example::

        sampler = Sampler.from_pretrained("little")
        print(sampler.generate("Reverse the line: Tom, Ann, Eve.").texts)
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
        self.on_canvases = getattr(model, "canvas_length", None) is not None
        """Whether the model refines canvases of random tokens, see :mod:`unmask.sampling.noise`."""
        # A packaged model has the buffer and block length of its training, and a policy trained on it.
        defaults = dict(getattr(model, "generation_defaults", {}))
        own = defaults.pop("policy", DEFAULT_POLICY)
        self.policy = as_policy(own if policy is None else policy)
        if config is not None and not isinstance(config, SamplerConfig):
            raise TypeError(f"config must be a SamplerConfig, got {type(config).__name__}")
        required = getattr(model, "required_settings", {})
        self.config = config or SamplerConfig(**{**defaults, **self.policy.decoding, **required})
        self.graphs: StepGraphs | None = None
        """Captured steps, made for the first generation that uses them and kept for later ones."""
        if isinstance(self.policy.bare, torch.nn.Module):
            self.policy.bare.to(model.device)
        self.policy.bare.attach(model)

    def __repr__(self) -> str:
        model, count = self.model, sum(p.numel() for p in getattr(self.model, "parameters", tuple)())
        about = f"{count / 1e6:,.1f} M parameters, {model.dtype}, {model.device}".replace("torch.", "")
        return f"Sampler of {type(model).__name__} ({about})\n  policy: {self.policy!r}\n  config: {self.config!r}"

    def __getstate__(self) -> dict[str, Any]:
        """The state without captured steps, which cannot be copied."""
        return {**self.__dict__, "graphs": None}

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        policy: str | UnmaskingPolicy | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        config: SamplerConfig | None = None,
        chat_template: bool | None = False,
        system_prompt: str | None = None,
        tokenizer: Any = None,
        **loading: Any,
    ) -> Sampler:
        """Load model and tokenizer by packaged name, local folder or hub id.

        ``loading`` are further arguments of :func:`unmask.load_model`: ``trust_remote_code``, ``device_map``,
        ``revision`` (also the tokenizer's), and its overrides such as ``quantization`` and ``block_length``.

        ``tokenizer`` is one, or its folder or hub id; None: that beside the model, and if there is none, prompts are
        token ids.
        With ``chat_template`` a text prompt is the user's message in the tokenizer's chat template, after the
        ``system_prompt``; None: if the tokenizer has one. False leaves texts as they are.
        """
        if late := sorted(set(loading) & DECODING):
            raise UnknownName(
                f"{late} belong to decoding: give config=SamplerConfig({late[0]}=...), or give them to generate"
            )
        given = {key: loading[key] for key in ("trust_remote_code", "revision") if key in loading}
        if tokenizer is None:
            with suppress(FileNotFoundError):
                tokenizer = load_tokenizer(name, **given)
        elif isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(tokenizer)
        tokenizer = with_chat_template(tokenizer, chat_template, system_prompt)
        model = load_model(name, device, dtype, **loading)
        return cls(model, tokenizer, policy, config)

    def generate(
        self, prompts: Prompts, attention_mask: Tensor | None = None, streamer: Streamer | None = None, **overrides: Any
    ) -> GenerationResult:
        """Complete each prompt with ``max_new_tokens`` tokens, ``num_return_sequences`` times one after the other.

        ``prompts``: a string, messages with "role" and "content", token ids, a list of these, a tokenizer's output, or
        int64 (B, P) with ``attention_mask`` (B, P) if left-padded. ``streamer``: one of transformers', for a single
        prompt; it gets the prompt and then the completion from left to right, and its ``end`` is called even if the
        generation fails. ``overrides`` replace fields of the Sampler's config for this call. Raises TypeError or
        ValueError for bad input before any work, FloatingPointError if logits were undefined (NaN, +inf) where a token
        had to be committed.
        """
        try:
            config = self.settled(overrides)
            state = self.prepare(prompts, attention_mask, config)
            if streamer is None:
                return self.result(state, config, self.steps(state, config))
            stream = PrefixStream(streamer, state, self.stop_strings(state.end_ids, config))
            return self.result(state, config, stream.follow(self.steps(state, config), state))
        finally:
            if streamer is not None:  # else a reader in another thread would wait for ever
                streamer.end()

    def infill(self, input_ids: Tensor, attention_mask: Tensor | None = None, **overrides: Any) -> GenerationResult:
        """Fill the mask tokens of int64 ``input_ids`` (B, T), wherever they are, and change nothing else.

        Blocks count from a row's first token, and the last may be shorter; blocks without masks are skipped; end of
        sequence does not stop a row.
        """
        for name in ("max_new_tokens", "target_nfe", "stop"):
            if overrides.get(name) not in (None, ()):
                raise ValueError(f"{name} does not apply to infill, which fills the holes of input_ids")
        config = self.settled({**overrides, "target_nfe": None, "stop": ()})
        self.check_config(config)
        ids, attention = given_texts(self, input_ids, attention_mask, "input_ids", config)
        parts = split(self, ids, attention, config)
        return assemble(ids, [(p, self.result(p.state, config, self.steps(p.state, config))) for p in parts])

    def stream(self, prompts: Prompts, attention_mask: Tensor | None = None, **overrides: Any) -> Iterator[StreamEvent]:
        """Decode as :meth:`generate` does, yielding the changes of each step. Bad input raises in the call itself.

        Rows are numbered as in the result. Tokens that were committed behind a ``stop`` are in no later event.
        """
        config = self.settled(overrides)
        return self._events(self.prepare(prompts, attention_mask, config), config)

    def settled(self, overrides: Mapping[str, Any]) -> SamplerConfig:
        """The Sampler's config with ``overrides``, and a seed, drawn from torch's generator if there is none."""
        config = self.config.updated(overrides)
        if config.seed is not None:
            return config
        return replace(config, seed=int(torch.randint(2**63 - 1, (1,))))

    def prepare(
        self,
        prompts: Prompts,
        attention_mask: Tensor | None,
        config: SamplerConfig,
        sequence: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> State:
        """Validated prompts followed by a buffer of masks; ``config`` is :meth:`settled`.

        Each prompt makes ``num_return_sequences`` rows. ``sequence`` (rows,) int64 keys their draws (None: the row's
        number); ``alpha`` (rows,) float32 is for a conditioned policy (None: the config's, else the policy's default).
        """
        self.check_config(config)
        model, length = self.model, config.max_new_tokens
        ids, attention = encode_prompts(prompts, attention_mask, self.tokenizer, self.padding_id)
        check_ids("prompts", ids, attention, model.vocab_size, model.mask_token_id)
        self.check_context(ids.shape[1] + length, f"prompt of {ids.shape[1]} tokens + max_new_tokens={length}")
        if self.on_canvases and ids.shape[0] and not ids.shape[1]:
            raise ValueError(f"prompts must have at least one token for {type(model).__name__}")
        ids, attention = repeated(ids, attention, config)
        room, surplus = room_for(model, config, ids, attention)
        if surplus is not None and len(ids):
            real = ids.shape[1] if attention is None else attention.sum(1).cpu()
            whole = int((surplus.cpu() - ids.shape[1] + real).max())
            self.check_context(whole, f"prompt + max_new_tokens={length} in whole blocks of {config.block_length}")
        tokens = torch.cat((ids, ids.new_full((ids.shape[0], room), model.mask_token_id)), dim=1)
        if surplus is not None:
            tokens.masked_fill_(torch.arange(tokens.shape[1]) >= surplus[:, None].cpu(), self.padding_id)
        if attention is not None:
            attention = torch.cat((attention, attention.new_ones((ids.shape[0], room))), dim=1).to(model.device)
        state = self.new_state(tokens.to(model.device), attention, ids.shape[1], config, sequence, alpha)
        state.horizon = length
        return state

    def new_state(
        self,
        tokens: Tensor,
        attention: Tensor | None,
        start: int,
        config: SamplerConfig,
        sequence: Tensor | None = None,
        alpha: Tensor | None = None,
    ) -> State:
        """The state of freshly masked ``tokens`` (N, T) on the model's device, whose buffer begins at ``start``."""
        length, device = tokens.shape[1] - start, tokens.device
        grid, block_length, phase = blocks_of(self.model, config, tokens, attention, start)
        edits = self.policy.edits
        state = State.create(tokens, start, self.model.mask_token_id, block_length, phase, edits)
        state.max_post, state.everywhere = self.policy.max_post if edits else None, self.policy.everywhere
        state.grid = grid
        state.mask_token_id, state.attention = self.model.mask_token_id, attention
        state.end_ids = self.own_stop_ids if config.stop_ids is None else config.stop_ids
        state.stop_ids = state.end_ids if config.stop_at_eos else ()
        if config.cfg_scale:
            state.prompt = tokens != state.mask_token_id
            state.prompt = state.prompt if attention is None else state.prompt & attention
        state.max_steps, state.horizon = config.max_steps or length, length
        state.seed = torch.full((1,), config.seed or 0, dtype=torch.int64, device=device)
        if sequence is not None:
            state.sequence.copy_(sequence)
        set_dials(state, self.policy, config, alpha)
        return state

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: the model's, and the one that ends an answer in the chat template, unless the
        config says otherwise."""
        return self.own_stop_ids if self.config.stop_ids is None else self.config.stop_ids

    @property
    def own_stop_ids(self) -> tuple[int, ...]:
        """The model's, and the one that ends an answer in the chat template."""
        eos, turn = self.model.eos_token_id, end_of_turn(self.tokenizer)
        own = tuple(getattr(self.model, "stop_ids", () if eos is None else (eos,)))
        return own if turn is None or turn in own else (*own, turn)

    @property
    def padding_id(self) -> int:
        """The id of left padding: the model's, else its end of sequence, else 0 or 1; never the mask token."""
        own = (getattr(self.model, "pad_token_id", None), self.model.eos_token_id, 0, 1)
        return next(i for i in own if i is not None and i != self.model.mask_token_id)

    def check_context(self, length: int, what: str) -> None:
        limit = getattr(self.model, "max_length", None)
        if limit is not None and length > limit:
            raise ValueError(f"{what} exceeds the model's context of {limit} tokens")

    def check_config(self, config: SamplerConfig) -> None:
        """Raise ValueError for settings that this model and policy do not support."""
        check_settings(self.model, self.policy, self.tokenizer, config)
        if config.cuda_graphs and (reason := self.why_no_graphs(config)):
            raise ValueError(f"cuda_graphs=True is not possible, as {reason}; None uses graphs where they are possible")

    def why_no_graphs(self, config: SamplerConfig) -> str | None:
        """The reason why steps cannot be captured, None if they can; see :mod:`unmask.sampling.graphs`."""
        device = torch.device(self.model.device)
        if self.graphs is None and device.type != "cuda":
            return f"the model is on {device}"
        return why_no_graphs(self.model, self.policy, config)

    def steps(self, state: State, config: SamplerConfig, share: bool = False) -> Iterator[StepRecord]:
        """Advance all rows of ``state`` to their end, yielding a record of every step.

        ``share`` is for rollouts, which repeat each prompt: on the CPU equal rows, also of recent steps, share a
        forward.
        """
        if self.on_canvases:
            yield from canvas_steps(self.model, self.policy, state, config)
            return
        count = int((state.status == RUNNING).sum())
        width = min(config.max_batch_size or count, count)
        on_cpu = state.tokens.device.type == "cpu"
        whole = model_attention(self.model) == "bidirectional"
        share = share and on_cpu and whole and can_share(self.policy, config)
        seen = SeenStates(SEEN_PER_ROW * width) if share else None
        step = Step(Forward(self.model, self.policy, config, seen), self.policy, config)
        strings, graphs = self.stop_strings(state.end_ids, config), self._free_graphs(config)
        filler = (*state.end_ids, self.padding_id)[0]
        watch = None if strings is None else StopWatch(strings, filler, late=not on_cpu)
        if graphs is None:
            yield from decode(state, step, width, watch)
            return
        with closing(GraphRunner(graphs, step, self.padding_id)) as runner:
            yield from decode(state, runner, width, watch)

    def _free_graphs(self, config: SamplerConfig) -> StepGraphs | None:
        """The captured steps with their lock held; None if there are none or another generation uses them."""
        if config.cuda_graphs is False or self.why_no_graphs(config) is not None:
            return None
        if self.graphs is None:
            self.graphs = StepGraphs(CudaCapture(torch.device(self.model.device)))
        return self.graphs if self.graphs.lock.acquire(blocking=False) else None

    def stop_strings(self, end_ids: Sequence[int], config: SamplerConfig) -> StopStrings | None:
        """What finds ``config.stop`` before the first of ``end_ids``; None if there is nothing to find."""
        ends = (*end_ids, self.model.mask_token_id)
        return StopStrings(self.tokenizer, config.stop, ends) if config.stop else None

    def result(self, state: State, config: SamplerConfig, records: Iterable[StepRecord]) -> GenerationResult:
        """Run ``records``, the steps of ``state``, to their end, and gather the result.

        Texts and token counts end at the first end of sequence, even if that did not stop the row; not in an infill.
        """
        holes, buffer = state.remaining.clone(), state.buffer[:, : state.horizon]
        recorder = Recorder() if config.record else None
        for _ in records if recorder is None else recorder.follow(records):
            pass
        state.raise_if_undefined()
        stops = None if state.infill else self.stop_strings(state.end_ids, config)
        ends, texts = self.read(buffer, () if state.infill else state.end_ids, stops)
        filled = torch.minimum((ends + 1).clamp_max(buffer.shape[1]), holes - state.remaining)
        if self.on_canvases:
            filled = (buffer != self.padding_id).sum(dim=1)  # as transformers counts
        return GenerationResult(
            sequences=state.tokens[:, : state.start + buffer.shape[1]],
            completions=buffer,
            steps=state.steps.clone(),
            forwards=state.forwards * (2 if config.cfg_scale else 1),
            finished=state.remaining == 0,
            filled=filled,
            texts=texts,
            trajectory=recorder.trajectory(state, self.policy.num_confidences) if recorder else None,
            origin=Origin.of(self, state, config) if recorder else None,
        )

    def read(
        self, completions: Tensor, end_ids: Sequence[int], strings: StopStrings | None
    ) -> tuple[Tensor, list[str] | None]:
        """Where ``completions`` (B, L) end, (B,) int64: the index of the first of ``end_ids``, L without one, or of the
        last token of a stop string; and the texts before that, None without a tokenizer."""
        ends, rows = first_stop(completions, end_ids), completions.tolist()
        if self.tokenizer is None:
            return ends, None
        texts = [
            self.tokenizer.decode(ids[:end], skip_special_tokens=True)
            for ids, end in zip(rows, ends.tolist(), strict=True)
        ]
        for row, (end, text) in (strings.cut(rows) if strings else {}).items():
            ends[row], texts[row] = end - 1, text
        return ends, texts

    def _events(self, whole: State, config: SamplerConfig) -> Iterator[StreamEvent]:
        for record in self.steps(whole, config):
            whole.put(record.rows, record.state)
            took = record.changed.cpu()
            if not bool(took.any()):
                continue
            rank, buffer = record.rank.cpu()[took, : whole.horizon], record.state.buffer.cpu()[took]
            positions, revised = (
                [row.nonzero().flatten().tolist() for row in flags] for flags in (rank >= 0, rank == REVISED)
            )
            yield StreamEvent(
                rows=record.rows.cpu()[took].tolist(),
                steps=record.state.steps.cpu()[took].tolist(),
                positions=positions,
                tokens=[row[p].tolist() for row, p in zip(buffer, positions, strict=True)],
                revised=revised,
                finished=record.state.done.cpu()[took].tolist(),
                completions=whole.buffer[:, : whole.horizon].cpu().clone(),
            )
        whole.raise_if_undefined()


def repeated(ids: Tensor, attention: Tensor | None, config: SamplerConfig) -> tuple[Tensor, Tensor | None]:
    """Every row of ``ids`` (B, T) and ``attention`` ``num_return_sequences`` times."""
    count = config.num_return_sequences
    return ids.repeat_interleave(count, 0), None if attention is None else attention.repeat_interleave(count, 0)
